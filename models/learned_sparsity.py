"""The share of points to select, beta, as a latent variable with a Beta hyperprior.

    beta ~ Beta(alpha, alpha'),    w_i | beta ~ Beta(a, a (1 - beta) / beta)

in place of the prior (8) with a fixed beta: the weights' own prior has mean beta, so that their
total is N_t beta up to sqrt(N_t) of their spread, and the density of w given beta is normalised
without approximation. The rest of the program is another model's. With `joint` every point is best
explained by being ignored, and beta goes to 0 as far as its hyperprior lets it; with `normalised` a
weight grows or shrinks by the sign of the point's gain, and beta follows the share that grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import plate_sum
from bads_ppl.program import Parts
from bads_ppl.weights import InstanceWeights
from models.normalised import normalised


@dataclass(frozen=True)
class LatentShare:
    """The prior of the weights given a latent beta, as a factor on their prior given a fixed one.

    Attributes:
        share: beta (), with its graph.
        weights: instance weights, whose own prior is Beta(a, b0).
    """

    share: Tensor
    weights: InstanceWeights

    @property
    def sparsity(self) -> Tensor:
        """Beta (), detached."""
        return self.share.detach()

    def factor(self, w: Tensor, train: Batch) -> None:
        """Add sum_i log Beta(w_i; a, b) - log Beta(w_i; a, b0), b = a (1 - beta) / beta."""
        a = torch.full((), self.weights.concentration, device=w.device)  # no copy from the host
        fixed = a * (1 - self.weights.mean) / self.weights.mean
        b = a * (1 - self.share) / self.share
        rest = plate_sum("log_rest", torch.log1p(-w), train)
        normaliser = torch.lgamma(a + b) - torch.lgamma(b)
        normaliser = normaliser - torch.lgamma(a + fixed) + torch.lgamma(fixed)
        pyro.factor("share", (b - fixed) * rest + train.size * normaliser)


def learned_sparsity(
    train: Batch,
    meta: Batch,
    parts: Parts,
    *,
    base: Callable[..., None] = normalised,
    alpha: float = 1.0,
    alpha_rest: float = 1.0,
    **options: Any,
) -> None:
    """p(theta, w, beta | D_t, D_m). Instance weights only; `parts.sparsity` gives beta's start.

    Sites: those of `base`, and beta.

    Args:
        train: train batch.
        meta: meta batch.
        parts: network, weights, loss and priors.
        base: `normalised` or `joint`, or another model that takes `prior`.
        alpha: first parameter of beta's hyperprior; with `alpha_rest` 1 it is uniform.
        alpha_rest: its second parameter; more: fewer points.
        **options: those of `base`.

    Raises:
        InputError: without instance weights or a starting value.
    """
    if not isinstance(parts.weights, InstanceWeights) or parts.sparsity is None:
        raise InputError(
            "learned_sparsity needs instance weights and a sparsity to start from, got "
            f"{type(parts.weights).__name__}: use weights=instance"
        )
    for name, value in (("alpha", alpha), ("alpha_rest", alpha_rest)):
        if not value > 0:
            raise InputError(f"{name} must be positive, got {value}: 1 and 1 are the uniform prior")
    hyperprior = dist.Beta(
        torch.full((), alpha, device=train.target.device),
        torch.full((), alpha_rest, device=train.target.device),
    )
    start: Any = {"initial": parts.sparsity.sparsity}
    share = pyro.sample("beta", hyperprior, infer=start)
    base(train, meta, parts, prior=LatentShare(share, parts.weights), **options)
