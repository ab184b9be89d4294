"""The directed model of (2): the normaliser Z(w) is kept.

Its gradient needs E[l_i(theta')] over theta' ~ p(theta' | w, D_t), which a companion chain theta'
estimates: the same updates on the same minibatches without the meta term. A point gains weight
when the meta set makes it better explained than the weighted train data alone do. No single
density has these updates as its gradient, so HMC and NUTS do not apply to this program.
"""

from typing import Literal

import pyro

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import Restart, running_mean, sample_network
from bads_ppl.program import Parts


def normalised(
    train: Batch,
    meta: Batch,
    parts: Parts,
    *,
    auxiliary: Literal["persistent", "restarted"] = "restarted",
    restart_every: int = 1,
    restart_share: float = 0.05,
    contrast: float = 3.0,
    clip: float = 3.0,
) -> None:
    """p(theta, w | D_t, D_m) as in (4) with (2) normalised.

    Sites: theta.<parameter>, auxiliary.<parameter>, w (and phi.<parameter>).

    Args:
        train: train batch.
        meta: meta batch.
        parts: network, weights, loss and priors.
        auxiliary: "persistent" lets theta' run on its own: asymptotically exact, and noisy.
            "restarted" draws theta' back to theta: the difference of the losses is then the
            effect of the last few meta steps on each point, an approximation (contrastive
            divergence) with far less noise.
        restart_every: restarted only: steps between restarts.
        restart_share: restarted only: part of the way back that a restart goes, in (0, 1]. 1 with
            restart_every = K copies theta every K steps; 1 / K at every step looks back as far,
            and sees as far at every step.
        contrast: restarted only: the log density of w gains contrast / beta times the difference
            over its running mean absolute value, so that it depends neither on the step size of
            theta nor on the scale of the weights.
        clip: restarted only: bound on the scaled difference.
    """
    if auxiliary not in ("persistent", "restarted"):
        raise InputError(f"auxiliary must be 'persistent' or 'restarted', got {auxiliary!r}")
    restarted = auxiliary == "restarted"
    restart = Restart("theta", restart_every if restarted else None, restart_share)
    network = parts.sample_network()
    companion = sample_network("auxiliary", parts.auxiliary, parts.prior, restart=restart)
    forward = parts.forward(network, train, meta)
    auxiliary_loss = parts.loss(companion(train.input), train.target)
    gain = (auxiliary_loss - forward.train_loss).detach()
    if restarted:
        size = running_mean("gain", gain.abs().mean(), window=100, kind="exponential")
        beta = 1.0 if parts.sparsity is None else parts.sparsity.sparsity
        gain = contrast / beta * (gain / (size + 1e-12)).clamp(-clip, clip)
    plate = train.plate("train")
    w = parts.weights.sample(train, plate, forward.features)
    fixed = w.detach()
    with plate:
        pyro.factor("train_loss", -parts.impact.train * fixed * forward.train_loss)  # to theta
        pyro.factor("auxiliary_loss", -parts.impact.train * fixed * auxiliary_loss)  # to theta'
        pyro.factor("gain", parts.impact.weight * (w - fixed) * gain)  # to w
    if parts.sparsity is not None:
        parts.sparsity.factor(w, train)
    parts.observe_meta(forward.meta_output, meta)
