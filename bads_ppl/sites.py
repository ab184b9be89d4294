"""The kinds of latent site that a stochastic-gradient kernel holds in place between its steps.

Parameters of a network stay in the module itself, other global latents are tensors of their own,
and local latents of a subsampled plate live in a table with one row per point. Beside them stand
the running statistics that a program's statements ask for. `bads_ppl.latents` brings them together.

Everything here is on the unconstrained scale unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor, nn

from bads_ppl.errors import InputError
from bads_ppl.primitives import Restart, Revert


class NetworkSite:
    """The trainable parameters of one module, all in one group, with their priors."""

    def __init__(
        self, name: str, module: nn.Module, prior: Any, companion: Restart | Revert | None
    ) -> None:
        self.name = name
        self.module = module
        self.companion = companion
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise InputError(
                f"network {name!r} has no parameter with requires_grad=True, so nothing to "
                "sample: unfreeze some of its parameters"
            )
        self.names = [n for n, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.priors = [prior(n, p) for n, p in named]
        # The score of a zero-mean Gaussian with one scale is theta / scale^2: no autograd needed.
        scales = [zero_mean_scale(prior) for prior in self.priors]
        self.decay = None if None in scales else [1 / s**2 for s in scales if s is not None]
        self.decays_alike = self.decay is not None and len(set(self.decay)) == 1
        self.moves: list[Tensor] | None = None  # of a Revert companion: m, theta' = theta + m
        self.part: list[Tensor] = []  # of a Revert companion: the plate's share of the gradient
        self.call: Callable[..., Any] = module
        if isinstance(companion, Revert):
            self.moves = [torch.zeros_like(p) for p in self.parameters]
            # It has no backward pass of its own.
            self.call = torch.no_grad()(lambda *args, **kwargs: module(*args, **kwargs))

    def log_prior(self) -> Tensor:
        """Log p(theta), () with its graph."""
        terms = [q.log_prob(p) for q, p in zip(self.priors, self.parameters, strict=True)]
        return torch.stack([term.sum() for term in terms]).sum()

    def gradients(self) -> list[Tensor]:
        """Gradient of the potential in each parameter, the closed-form prior included."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self.decay is not None:
            with torch.no_grad():
                if self.decays_alike:
                    torch._foreach_add_(grads, self.parameters, alpha=self.decay[0])
                else:
                    for grad, value, decay in zip(grads, self.parameters, self.decay, strict=True):
                        grad.add_(value, alpha=decay)
        return grads


def zero_mean_scale(prior: Any) -> float | None:
    """The scale of a Normal(0, scale) that is the same for all elements, else None."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if not isinstance(prior, Normal):
        return None
    loc, scale = prior.loc, prior.scale
    if bool((loc != 0).any()) or bool((scale != scale.flatten()[0]).any()):
        return None
    return float(scale.flatten()[0])


@dataclass
class GlobalSite:
    """A latent outside of subsampled plates that is not a network's parameter."""

    value: Tensor  # leaf, unconstrained
    transform: Any  # unconstrained to constrained


@dataclass
class Table:
    """A local latent of a plate: one row per point, of which a step moves the batch's."""

    plate: str
    value: Tensor  # (N, ...), unconstrained
    transform: Any
    rows: Tensor | None = None  # leaf (B, ...): the rows of the batch in hand
    constrained: Tensor | None = None  # the same rows as the program saw them
    index: Tensor | None = None  # (B,)

    def values(self) -> Tensor:
        """All rows (N, ...) on the constrained scale."""
        result: Tensor = self.transform(self.value)
        return result


@dataclass
class PlateSum:
    """State of a `plate_sum`: the total, and for a computed value what each row had last."""

    total: Tensor  # (), float64 where the device has it
    table: str | None  # the local site whose values are summed
    memory: Tensor | None = None  # (N,) for computed values
    pending: tuple[Tensor, Tensor] | None = None  # index (B,) and value (B,) of this step

    def add(self, change: Tensor, share: Tensor | None) -> None:
        """Add the rows' changes (B,); `share` (B,) splits those of rows that occur repeatedly."""
        if share is not None:
            change = change * share
        self.total += change.sum(dtype=self.total.dtype)


@dataclass
class RunningMean:
    """State of a `running_mean`: the last values, or one decayed average."""

    kind: str
    window: int
    values: Tensor  # (window,) for "simple", (1,) for "exponential"
    count: int = 0
    pending: Tensor | None = None

    def mean(self) -> Tensor:
        if self.kind == "exponential":
            return self.values[0]
        return self.values[: min(self.count, self.window)].mean()

    def commit(self) -> None:
        if self.pending is None:
            return
        if self.kind == "exponential":
            share = max(1 / self.window, 1 / (self.count + 1))  # a plain average at first
            self.values.lerp_(self.pending.reshape(1), share)
        else:
            self.values[self.count % self.window] = self.pending
        self.count += 1
        self.pending = None


Repeats = tuple[Tensor, Tensor]
"""Of rows that may occur repeatedly: see `first_occurrence`."""


def first_occurrence(index: Tensor) -> Repeats:
    """Of each entry, the position (B,) of the first equal one, and 1 / how often it occurs (B,)."""
    same = index[:, None] == index[None, :]
    return same.to(torch.uint8).argmax(dim=1), 1 / same.sum(dim=1)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, as it was afterwards."""
    was = [(part, part.training) for part in module.modules()]  # parts may differ
    module.eval()
    try:
        yield
    finally:
        for part, training in was:
            part.training = training
