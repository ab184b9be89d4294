"""Methods: BADS and the baselines, as programs that one kernel runs.

Every method gives the same `Setup`; from there on the data, the number of steps, the kernel, the
chains and the averaging over draws are the same for all. Bi-level optimisation is a program of its
own at temperature 0. Every other baseline is the joint program with fixed weights: what it does
with the train set is what its weights say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Impact, Model, last_linear
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork, Weights
from inference.tasks import Task
from models.joint import joint


@dataclass(frozen=True)
class Setup:
    """What a method does with a task.

    Attributes:
        model: the Pyro program.
        weights: builds a chain's weights from its network.
        sparsity: prior on the total weight, None for fixed weights.
        impact: impact constants.
        points: how many points count in the potential, (sum of weights) + (meta points): a
            learning rate on the mean loss is eta = 2 learning_rate / points.
        train: the train points that the kernel sees.
        fixed: (N_t,) the weights where they are fixed, for all points of the task.
        optimises: the weights are optimised, their temperature is 0.
        names: model and weights, as recorded in the results.
    """

    model: Model
    weights: Callable[[nn.Module], Weights]
    sparsity: SparsityPrior | None
    impact: Impact
    points: float
    train: Data
    fixed: Tensor | None = None
    optimises: bool = False
    names: tuple[str, str] = ("joint", "fixed")


def bads(
    task: Task,
    *,
    model: Model,
    weights: Callable[[nn.Module], Weights],
    sparsity: SparsityPrior,
    impact: Impact,
    names: tuple[str, str],
    **_: Any,
) -> Setup:
    """Bayesian data point selection: weights are latent."""
    points = sparsity.target(len(task.train)) + len(task.meta)
    return Setup(model, weights, sparsity, impact, points, task.train, names=names)


def blo(
    task: Task,
    *,
    weights: Callable[[nn.Module], Weights],
    names: tuple[str, str],
    **given: Any,
) -> Setup:
    """One-step bi-level optimisation: weights are optimised, with the method's own model.

    Instance weights have a flat prior and start at 0.5; the prior on their total is a penalty.
    """

    def flat(network: nn.Module) -> Weights:
        built = weights(network)
        return InstanceWeights() if isinstance(built, InstanceWeights) else built

    setup = bads(task, weights=flat, names=("bilevel", names[1]), **given)
    return replace(setup, optimises=True)


def mixing(task: Task, **_: Any) -> Setup:
    """Train on D_t and D_m together, every point once."""
    return _fixed(task, torch.ones(len(task.train)))


def meta_only(task: Task, **_: Any) -> Setup:
    """Train on D_m alone: one train point with weight 0 stands for all, since none counts."""
    return Setup(
        joint,
        _always(FixedWeights(torch.zeros(1))),
        None,
        Impact(),
        len(task.meta),
        task.train.subset(torch.tensor([0])),
        torch.zeros(len(task.train)),
    )


def random_select(task: Task, *, sparsity: SparsityPrior, seed: int, **_: Any) -> Setup:
    """Train on D_m and a random share beta of D_t."""
    count = sparsity.target(len(task.train))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train), generator=generator)[:count].sort().values
    weights = torch.zeros(len(task.train))
    weights[chosen] = 1.0
    return Setup(
        joint,
        _always(FixedWeights(torch.ones(count))),
        None,
        Impact(),
        count + len(task.meta),
        task.train.subset(chosen),
        weights,
    )


def dup_meta(task: Task, **_: Any) -> Setup:
    """Train on D_t and D_m, the latter repeated to the size of D_t."""
    repeats = len(task.train) / len(task.meta)
    return _fixed(task, torch.ones(len(task.train)), Impact(meta=repeats))


def _fixed(task: Task, weights: Tensor, impact: Impact | None = None) -> Setup:
    impact = impact or Impact()
    points = float(weights.sum()) + impact.meta * len(task.meta)
    return Setup(joint, _always(FixedWeights(weights)), None, impact, points, task.train, weights)


def _always(weights: FixedWeights) -> Callable[[nn.Module], Weights]:
    def build(network: nn.Module) -> Weights:
        device = next(network.parameters()).device
        return FixedWeights(weights.values.to(device))

    return build


METHODS: dict[str, Callable[..., Setup]] = {
    "bads": bads,
    "blo": blo,
    "mixing": mixing,
    "meta_only": meta_only,
    "random_select": random_select,
    "dup_meta": dup_meta,
}


def method(name: str) -> Callable[..., Setup]:
    """The method called `name`.

    Raises:
        InputError: listing the methods there are.
    """
    if name not in METHODS:
        raise InputError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    return METHODS[name]


def instance_weights(
    network: nn.Module, *, classes: int, mean: float = 0.5, concentration: float = 1.0
) -> Weights:
    """One latent weight per point (`weights=instance`)."""
    return InstanceWeights(mean, concentration)


def network_weights(
    network: nn.Module,
    *,
    classes: int,
    label: bool = False,
    initial: float = 0.5,
    prior_scale: float = 3.0,
) -> Weights:
    """A linear layer on the network's embedding (`weights=network`), on the network's device."""
    head = last_linear(network)
    weights = WeightNetwork(
        head.in_features, classes if label else 0, initial=initial, prior=NormalPrior(prior_scale)
    )
    return weights.to(head.weight.device)
