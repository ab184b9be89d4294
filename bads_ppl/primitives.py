"""Six Pyro statements that programs use beside `pyro.sample`, `pyro.plate` and `pyro.factor`.

Each is an ordinary effectful statement: it has a plain meaning under any Pyro handler (trace,
NUTS, SVI, none), and a kernel that keeps state over steps may answer it more cheaply.

- `sample_network`: the parameters of a module, one Gaussian site per parameter tensor.
- `plate_sum`: the sum of a per-point value over a whole plate, of which a minibatch is at hand.
- `running_mean`: a statistic averaged over the last steps.
- `steps_taken`: the number of steps so far, for what changes over a run.
- `wanted_site`: the site that a program is run for, where that is not a step.
- `release_graph`: nothing else is differentiated through what led to some observations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import pyro
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from bads_ppl.data import Batch
from bads_ppl.errors import InputError


class NetworkPrior(Protocol):
    """The prior of one parameter tensor: name and parameter to a distribution of its shape."""

    def __call__(self, name: str, parameter: Tensor) -> Any: ...


@dataclass(frozen=True)
class Restart:
    """A companion network with a chain of its own, copied from another network now and then.

    Attributes:
        network: name of the other network; the companion takes its step size.
        every: steps between copies; None: the two start at the same values and go their ways.
    """

    network: str
    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise InputError(f"a companion must restart every 1 or more steps, got {self.every}")


@dataclass(frozen=True)
class Revert:
    """A companion network at another network's parameters less their recent moves due to a plate.

    After each step it is theta + m, where m <- (1 - 1 / window) m + eta / 2 grad U_plate(theta):
    to first order where a chain without that plate's terms would be after `window` steps, with no
    backward pass of its own.

    Attributes:
        network: name of the other network.
        plate: the plate whose terms' moves are taken back.
        window: steps that are looked back on, at least 1.
    """

    network: str
    plate: str
    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"window must be at least 1 step, got {self.window}")


class _WithParameters:
    """A module that is called with sampled values in place of its own parameters."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.module = module
        self.values = values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, self.values, args, kwargs)


def sample_network(
    name: str, module: nn.Module, prior: NetworkPrior, *, companion: Restart | Revert | None = None
) -> Callable[..., Any]:
    """Sample the trainable parameters of `module` at sites "<name>.<parameter>".

    Args:
        name: prefix of the sites, and the group by which kernels set a step size.
        module: its parameters with requires_grad=True become latent, the rest stays as it is.
        prior: maps a parameter's name and tensor to its prior distribution.
        companion: makes this network the companion of another one of the same shape. A stateless
            handler ignores it.

    Returns:
        A callable like `module`. Under `SGLD` it is `module` itself, whose parameters the kernel
        updates in place; elsewhere the sampled values are put in with `functional_call`.
    """
    return cast(
        Callable[..., Any],
        _network(module, prior, name, companion, name=f"{name}.network"),
    )


@effectful(type="network")
def _network(
    module: nn.Module, prior: NetworkPrior, prefix: str, companion: Restart | Revert | None
) -> _WithParameters:
    values = {
        parameter: pyro.sample(f"{prefix}.{parameter}", prior(parameter, tensor))
        for parameter, tensor in module.named_parameters()
        if tensor.requires_grad
    }
    return _WithParameters(module, values)


def plate_sum(name: str, value: Tensor, batch: Batch) -> Tensor:
    """Sum () over the whole plate of a per-point `value` (B,) known for the batch's rows.

    Stateless handlers return the plate-scaled estimate `batch.total(value)`, exact on full data.
    `SGLD` remembers the value that each row had last and returns
    sum(remembered) + batch.total(value - remembered): for a value that is itself a local latent
    site this is the exact sum at a cost of O(B); for a value computed from global sites it is
    unbiased, with a variance that vanishes as the value settles. In both cases its derivative is
    that of the plate-scaled estimate. Call it outside the plate.
    """
    return _plate_sum(value, batch, name=name)


@effectful(type="plate_sum")
def _plate_sum(value: Tensor, batch: Batch) -> Tensor:
    return batch.total(value)


def running_mean(
    name: str, value: Tensor, *, window: int, kind: Literal["simple", "exponential"] = "simple"
) -> Tensor:
    """Average () of a statistic over the last `window` steps, constant under differentiation.

    The value of this step enters after the step. Before the first step, and under stateless
    handlers, the value itself is returned. `exponential` keeps no list: it decays by
    1 - 1 / window a step.
    """
    return _running_mean(value.detach(), window, kind, name=name)


@effectful(type="running_mean")
def _running_mean(value: Tensor, window: int, kind: str) -> Tensor:
    return value


def wanted_site() -> str | None:
    """The site that the program is run for the values of, None in a step.

    What that site does not depend on may then be left out.
    """
    return _wanted_site(name="wanted_site")


@effectful(type="wanted_site")
def _wanted_site() -> str | None:
    return None


def steps_taken() -> int:
    """The number of steps that the kernel has taken; 0 under stateless handlers.

    It is part of a chain's checkpoint, as the kernel's own count is. A program that asks for it
    changes as it runs and has no single density: its draws are called an optimisation path.
    """
    return _steps_taken(name="steps_taken")


@effectful(type="steps_taken")
def _steps_taken() -> int:
    return 0


def release_graph(site: str, *others: str) -> None:
    """Nothing else is differentiated through what led to these observations.

    A kernel may take their gradients here, in place of at the program's end, so that what one
    network's backward pass needs is not held while another one runs. The gradients are the same;
    parameters hold their parts of them from here on. What led to the observations is of use
    detached only, to all other statements: to later ones, and to the density of a latent that is
    no network's parameter, which is differentiated at the end. A step of a program that does
    otherwise is refused.

    It saves nothing in a program with a `Revert` companion, whose gradients are all taken at the
    end, and where rows of local latents take several steps (`local_steps`), for which the outputs
    of all networks are held.

    Args:
        site: name of an observed site or factor stated before.
        others: further ones.

    Raises:
        InputError: under `SGLD` and its like, if no such site was stated.
    """
    _release_graph(site, *others, name="release_graph")


@effectful(type="release_graph")
def _release_graph(*sites: str) -> None:
    return None
