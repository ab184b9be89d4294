"""Our steps: kernels on programs, as a user builds them, with nothing bypassed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from bads_ppl import (
    SGLD,
    Data,
    InstanceWeights,
    NormalPrior,
    Parts,
    PreconditionedSGLD,
    SparsityPrior,
    WeightNetwork,
    bind,
)
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.program import embedding_layer
from benchmarks.step_cost import problems
from benchmarks.step_cost.problems import SCALE, SPARSITY, WINDOW, Problem
from models import joint, normalised
from models.bilevel import bilevel

TASK = {"minibatches": "importance", "clip": {"theta": 0.3, "w": 3.0}}
"""What `weights=instance` and `task=mnist` set beside steps and temperatures."""


@dataclass(frozen=True)
class Ours:
    """A program and a sampler.

    Attributes:
        model: the model.
        weights: "instance" or "network".
        sampler: the kernel.
        options: further options of the kernel.
    """

    model: Callable[..., None]
    weights: str
    sampler: Callable[..., MinibatchKernel] = SGLD
    options: dict[str, Any] = field(default_factory=dict)


restarted = partial(normalised, auxiliary="restarted", window=WINDOW)
OURS = {
    "joint, instance": Ours(joint, "instance"),
    "joint, network": Ours(joint, "network"),
    "normalised restarted, instance": Ours(restarted, "instance"),
    "normalised restarted, network": Ours(restarted, "network"),
    "normalised reverted, instance": Ours(normalised, "instance"),
    "normalised reverted, network": Ours(normalised, "network"),
    "joint, instance, as tasks sample": Ours(joint, "instance", options=TASK),
    "normalised reverted, as tasks sample": Ours(normalised, "instance", options=TASK),
    "joint, instance, preconditioned": Ours(joint, "instance", PreconditionedSGLD),
    "our one-step bi-level": Ours(
        partial(bilevel, rate=0.1), "instance", options={"temperature": 0.0}
    ),
}


def kernel(
    name: str,
    problem: Problem,
    network: nn.Module,
    train: Data,
    meta: Data,
    cuda_graph: bool | None = None,
) -> Any:
    """The kernel, set up and at its first step."""
    ours = OURS[name]
    weights: Any = InstanceWeights(mean=SPARSITY)
    group, step, heat = "w", problems.W_STEP, problems.W_TEMPERATURE
    if ours.weights == "network":
        width = embedding_layer(network).in_features
        weights = WeightNetwork(width, 10, initial=SPARSITY, prior=NormalPrior(3.0))
        weights = weights.to(train.device)
        group, step, heat = "phi", problems.PHI_STEP, 1.0
    parts = Parts(network, weights, SparsityPrior(SPARSITY), prior=NormalPrior(SCALE))
    options: dict[str, Any] = {
        "temperature": {"theta": problems.THETA_TEMPERATURE, group: heat},
        **ours.options,
    }
    made = ours.sampler(
        bind(ours.model, parts),
        step_size={"theta": problems.THETA_STEP, group: step},
        train_batch=problem.batches[0],
        meta_batch=problem.batches[1],
        generator=torch.Generator(device=train.device).manual_seed(problems.SEED),
        cuda_graph=cuda_graph,
        **options,
    )
    made.setup(1 if ours.sampler is PreconditionedSGLD else 0, train, meta)
    return made
