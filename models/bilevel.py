"""The baseline's model: one-step bi-level optimisation, with the exact hypergradient.

A lower level trains theta on the weighted train data; an upper level moves w down the meta loss L_m
that theta has after one more step of the lower level:

    theta'(w) = theta - rate * grad_theta J(theta, w),    J = (sum_i w_i l_i + ...) / points
    -d L_m(theta'(w)) / d w_i = rate / points * <grad l_i(theta), grad L_m(theta'(w))>

(Ren et al., 2018; with a weight network Shu et al., 2019). The derivative through the step is
exact. Both gradients are plain ones, and their products for all points come from one pass of the
train losses in forward mode, so that no second derivative is ever formed. At temperature 0 this is
optimisation: there is no density, the path is no posterior, and HMC and NUTS do not apply to this
program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import running_mean
from bads_ppl.priors import TotalPrior
from bads_ppl.program import Parts
from bads_ppl.ranks import ALONE, Ranks

Values = dict[str, Tensor]
"""Parameters by name."""


def bilevel(
    train: Batch,
    meta: Batch,
    parts: Parts,
    *,
    rate: float,
    contrast: float = 3.0,
    clip: float = 3.0,
    lower_meta: bool = True,
    prior: TotalPrior | None = None,
) -> None:
    """One-step bi-level optimisation of w, as drifts for a kernel at temperature 0.

    Sites: theta.<parameter>, w (and phi.<parameter>).

    Args:
        train: train batch.
        meta: meta batch.
        parts: network, weights, loss and priors.
        rate: > 0, learning rate of the inner step, on the mean loss of the lower level.
        contrast: w moves along contrast / beta times the negative hypergradient over its running
            mean absolute value, as `normalised` scales its gain. More: weights nearer 0 and 1.
        clip: bound on the scaled hypergradient.
        lower_meta: the lower level trains on the meta points too, with weight 1 each.
        prior: of the total weight; default `parts.sparsity`.

    Raises:
        InputError: if rate is not positive.
    """
    if not rate > 0:
        raise InputError(f"the rate of the inner step must be positive, got {rate}: try 0.1")
    prior = prior if prior is not None else parts.sparsity
    network = parts.sample_network()
    forward = parts.forward(network, train, meta)
    plate = train.plate("train")
    w = parts.weights.sample(train, plate, forward.features)
    fixed = w.detach()
    beta = 1.0 if prior is None else prior.sparsity
    gain = -_of_batches(parts, train, meta, fixed, rate, beta, lower_meta)
    size = running_mean("gain", gain.abs().mean(), window=100, kind="exponential")
    gain = contrast / beta * (gain / (size + 1e-12)).clamp(-clip, clip)
    with plate:
        pyro.factor("train_loss", -parts.impact.train * fixed * forward.train_loss)  # to theta
        pyro.factor("gain", parts.impact.weight * (w - fixed) * gain)  # to w
    if prior is not None:
        prior.factor(w, train)
    if lower_meta:
        parts.observe_meta(forward.meta_output, meta, forward.meta_loss)


def hypergradient(
    train_losses: Callable[[Values], Tensor],
    rest: Callable[[Values], Tensor],
    meta_loss: Callable[[Values], Tensor],
    theta: Values,
    share: Tensor,
    rate: float,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Derivative (B,) of the meta loss after one step of the lower level, in each point's share.

    Args:
        train_losses: losses (B,) of the points at given parameters.
        rest: what else () the lower level goes down at given parameters.
        meta_loss: the meta loss () at given parameters.
        theta: the parameters before the step.
        share: (B,) of each point: the lower level is share @ train_losses + rest.
        rate: length of the step.
        ranks: processes that have the other points; gradients are means over them.
    """
    share = share.detach()
    theta = {name: value.detach() for name, value in theta.items()}
    slope = _gradient(lambda values: share @ train_losses(values) + rest(values), theta)
    ranks.mean_(list(slope.values()))
    ahead = {name: value - rate * slope[name] for name, value in theta.items()}
    upper = _gradient(meta_loss, ahead)
    ranks.mean_(list(upper.values()))
    # Nothing is kept for a backward pass; fused attention has no forward mode.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = {name: forward_ad.make_dual(value, upper[name]) for name, value in theta.items()}
        along = forward_ad.unpack_dual(train_losses(duals)).tangent
    return torch.zeros_like(share) if along is None else -rate * along


def _gradient(function: Callable[[Values], Tensor], theta: Values) -> Values:
    """Of a scalar function of parameters, at theta."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        slopes = torch.autograd.grad(function(leaves), list(leaves.values()))
    return dict(zip(leaves, slopes, strict=True))


def _of_batches(
    parts: Parts,
    train: Batch,
    meta: Batch,
    w: Tensor,
    rate: float,
    beta: float | Tensor,
    lower_meta: bool,
) -> Tensor:
    """The hypergradient (B,) on a minibatch, for the network's parameters as they are."""
    theta = {
        name: value.detach()
        for name, value in parts.network.named_parameters()
        if value.requires_grad
    }

    # Running statistics (batch normalisation) follow the chain's own pass alone: copies here.
    buffers = {name: buffer.clone() for name, buffer in parts.network.named_buffers()}

    def losses(values: Values, batch: Batch) -> Tensor:
        output: Any = functional_call(parts.network, values | buffers, (batch.input,))
        return parts.loss(output, batch.target)

    def rest(values: Values) -> Tensor:
        return meta.total(losses(values, meta)) / points

    points = beta * train.size + lower_meta * meta.size
    share = w * (train.size / len(train)) / points
    if train.importance is not None:
        share = share * train.importance
    return hypergradient(
        lambda values: losses(values, train),
        rest if lower_meta else lambda values: torch.zeros((), device=w.device),
        lambda values: losses(values, meta).mean(),
        theta,
        share,
        rate,
        train.ranks,
    )
