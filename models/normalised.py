"""The directed model of (2): the normaliser Z(w) is kept.

Its gradient needs E[l_i(theta')] over theta' ~ p(theta' | w, D_t), which a companion chain theta'
estimates: the same updates on the same minibatches without the meta term. A point gains weight
when the meta set makes it better explained than the weighted train data alone do. No single
density has these updates as its gradient, so HMC and NUTS do not apply to this program.

A persistent companion estimates that difference as it is. The others see the effect of the last
few meta steps only; there the difference is put on a scale of its own, and the drift of `joint`, a
point's loss, can be put on the same scale and taken away: the first finds rare classes and the
second wrong labels (`docs/results.md`).
"""

from typing import Literal

import pyro
from torch import Tensor

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import (
    Restart,
    Revert,
    release_graph,
    running_mean,
    sample_network,
)
from bads_ppl.priors import TotalPrior
from bads_ppl.program import Parts

ROUNDING = 1e-6
"""Of losses, relative: what two passes over a batch with equal parameters may differ by."""


def normalised(
    train: Batch,
    meta: Batch,
    parts: Parts,
    *,
    auxiliary: Literal["persistent", "restarted", "reverted"] = "reverted",
    window: int = 20,
    contrast: float = 3.0,
    loss_contrast: float = 2.0,
    clip: float = 3.0,
    centre: bool | None = None,
    prior: TotalPrior | None = None,
) -> None:
    """p(theta, w | D_t, D_m) as in (4) with (2) normalised.

    Sites: theta.<parameter>, auxiliary.<parameter>, w (and phi.<parameter>).

    Args:
        train: train batch.
        meta: meta batch.
        parts: network, weights, loss and priors.
        auxiliary: "persistent" lets theta' run on its own: asymptotically exact, and noisy.
            "restarted" copies theta to theta' every `window` steps: the difference of the losses
            is then the effect of the last few meta steps on each point, an approximation
            (contrastive divergence) with far less noise. "reverted" takes the meta steps of the
            last `window` steps back from theta instead of running a second chain: the same effect
            to first order, seen at every step, and cheaper.
        window: steps that "restarted" and "reverted" look back on, at least 1.
        contrast: not persistent: the log density of w gains contrast / beta times the difference
            over its running mean absolute value in the batches as they are drawn, so that it
            depends neither on the step size of theta nor on the scale of the weights. More: weights
            nearer 0 and 1.
        loss_contrast: not persistent: the log density of w loses loss_contrast / beta times the
            point's loss less the train set's mean loss, over the mean absolute value of that. More:
            wrong labels lose more, and points of rare classes with them. 0: no such drift.
        clip: not persistent: bound on both scaled values.
        centre: not persistent: take the train set's mean difference away first, so that w is moved
            by how a point differs from the others, and the total of w by its prior alone. The scale
            is then the mean absolute deviation of the difference. None: no.
        prior: of the total weight; default `parts.sparsity`.
    """
    companions: dict[str, Restart | Revert] = {
        "persistent": Restart("theta"),
        "restarted": Restart("theta", window),
        "reverted": Revert("theta", "meta", window),
    }
    if auxiliary not in companions:
        raise InputError(f"auxiliary must be one of {sorted(companions)}, got {auxiliary!r}")
    companion = companions[auxiliary]
    prior = prior if prior is not None else parts.sparsity
    network = parts.sample_network()
    other = sample_network("auxiliary", parts.auxiliary, parts.prior, companion=companion)
    # theta' sees train rows alone: what it is compared with must, where rows change each other.
    apart = auxiliary == "reverted" or parts.normalises_batches
    forward = parts.forward(network, train, meta, apart=apart)
    plate = train.plate("train")
    w = parts.weights.sample(train, plate, forward.features)  # before what w does not depend on
    fixed = w.detach()
    with plate:
        pyro.factor("train_loss", -parts.impact.train * fixed * forward.train_loss)  # to theta
    parts.observe_meta(forward.meta_output, meta, forward.meta_loss)
    train_loss = forward.train_loss.detach()
    release_graph("train_loss", "meta_target")  # theta's, before theta' makes one
    auxiliary_loss = parts.loss(other(train.input), train.target)
    gain = auxiliary_loss.detach() - train_loss
    if auxiliary != "persistent":
        if centre:
            gain = gain - _mean_over_train_set("mean_gain", gain, train)
        size = running_mean("gain", gain.abs().mean(), window=100, kind="exponential")
        # There is no scale before the companion has parted from theta, by more than by rounding.
        known = size > ROUNDING * train.total(train_loss) / train.size
        gain = contrast * known * (gain / (size + 1e-12)).clamp(-clip, clip)
        if loss_contrast > 0:
            gain = gain - loss_contrast * _scaled_loss(train_loss, train).clamp(-clip, clip)
        gain = gain / (1.0 if prior is None else prior.sparsity)
    with plate:
        if auxiliary != "reverted":
            pyro.factor("auxiliary_loss", -parts.impact.train * fixed * auxiliary_loss)  # theta'
        pyro.factor("gain", parts.impact.weight * (w - fixed) * gain)  # to w
    if prior is not None:
        prior.factor(w, train)


def _scaled_loss(loss: Tensor, train: Batch) -> Tensor:
    """Losses (B,) less the train set's mean loss, over the mean absolute value of that."""
    apart = loss - _mean_over_train_set("mean_loss", loss, train)
    return apart / (_mean_over_train_set("loss_spread", apart.abs(), train) + 1e-12)


def _mean_over_train_set(name: str, value: Tensor, train: Batch) -> Tensor:
    mean = train.total(value) / train.size
    return running_mean(name, mean, window=100, kind="exponential")
