"""Methods: BADS and the baselines, as programs that one kernel runs.

Every method gives the same `Setup`; from there on the data, the number of steps, the kernel, the
chains and the averaging over draws are the same for all. Bi-level optimisation is a program of its
own at temperature 0. Baselines that select by a score (`inference.scored_methods`) do so in every
step or once, ahead; every other baseline is the joint program with fixed weights: what it does with
the train set is what its weights say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bads_ppl.errors import InputError
from bads_ppl.priors import NormalPrior
from bads_ppl.program import Impact, embedding_layer
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork, Weights
from inference.options import check_arguments
from inference.scored_methods import askllm, cds, classact, rds, rho_loss
from inference.setups import Given, Setup, always, chosen, fixed
from inference.tasks import Task
from models.joint import joint


def bads(task: Task, given: Given) -> Setup:
    """Bayesian data point selection: weights are latent."""
    points = given.sparsity.target(len(task.train)) + len(task.meta)
    return Setup(
        given.model,
        given.weights,
        given.sparsity,
        given.impact,
        points,
        task.train,
        names=given.names,
    )


def blo(task: Task, given: Given) -> Setup:
    """One-step bi-level optimisation: weights are optimised, with the method's own model.

    Instance weights have a flat prior and start at 0.5; the prior on their total is a penalty.
    """

    def flat(network: nn.Module) -> Weights:
        built = given.weights(network)
        return InstanceWeights() if isinstance(built, InstanceWeights) else built

    names = ("bilevel", given.names[1])
    return replace(bads(task, replace(given, weights=flat, names=names)), optimises=True)


def mixing(task: Task, given: Given) -> Setup:
    """Train on D_t and D_m together, every point once."""
    return fixed(task, torch.ones(len(task.train)))


def meta_only(task: Task, given: Given) -> Setup:
    """Train on D_m alone: one train point with weight 0 stands for all, since none counts."""
    return Setup(
        joint,
        always(FixedWeights(torch.zeros(1))),
        None,
        Impact(),
        len(task.meta),
        task.train.subset(torch.tensor([0])),
        torch.zeros(len(task.train)),
    )


def random_select(task: Task, given: Given) -> Setup:
    """Train on D_m and a random share beta of D_t."""
    count = given.sparsity.target(len(task.train))
    generator = torch.Generator().manual_seed(given.seed)
    return chosen(task, torch.randperm(len(task.train), generator=generator)[:count])


def dup_meta(task: Task, given: Given) -> Setup:
    """Train on D_t and D_m, the latter repeated to the size of D_t."""
    repeats = len(task.train) / len(task.meta)
    return fixed(task, torch.ones(len(task.train)), Impact(meta=repeats))


METHODS: dict[str, Callable[..., Setup]] = {
    "bads": bads,
    "blo": blo,
    "mixing": mixing,
    "meta_only": meta_only,
    "random_select": random_select,
    "dup_meta": dup_meta,
    "cds": cds,
    "rho_loss": rho_loss,
    "classact": classact,
    "rds": rds,
    "askllm": askllm,
}


def method(name: str, rule: Mapping[str, Any] | None = None) -> Callable[[Task, Given], Setup]:
    """The method called `name`, with its own options.

    Raises:
        InputError: listing the methods there are, or naming an option that it does not have.
    """
    if name not in METHODS:
        raise InputError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    bound = partial(METHODS[name], **(rule or {}))
    check_arguments(bound, "method.rule")
    return bound


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
    width = embedding_layer(network).in_features
    weights = WeightNetwork(
        width, classes if label else 0, initial=initial, prior=NormalPrior(prior_scale)
    )
    return weights.to(next(network.parameters()).device)
