"""The directed model of (2): the normaliser Z(w) is kept.

Its gradient needs E[l_i(theta')] over theta' ~ p(theta' | w, D_t), which a companion chain theta'
estimates: the same updates on the same minibatches without the meta term. A point gains weight
when the meta set makes it better explained than the weighted train data alone do. No single
density has these updates as its gradient, so HMC and NUTS do not apply to this program.
"""

from typing import Literal

import pyro

from bads_ppl.data import Batch
from bads_ppl.primitives import running_mean, sample_network
from bads_ppl.program import Parts


def normalised(
    train: Batch,
    meta: Batch,
    parts: Parts,
    *,
    auxiliary: Literal["persistent", "restarted"] = "restarted",
    restart_every: int = 5,
    contrast: float = 1.0,
    clip: float = 5.0,
) -> None:
    """p(theta, w | D_t, D_m) as in (4) with (2) normalised.

    Sites: theta.<parameter>, auxiliary.<parameter>, w (and phi.<parameter>).

    Args:
        train: train batch.
        meta: meta batch.
        parts: network, weights, loss and priors.
        auxiliary: "persistent" lets theta' run on its own: asymptotically exact. "restarted"
            copies theta to theta' every `restart_every` steps: the difference of the losses is
            the effect of the last few meta steps on each point, an approximation (contrastive
            divergence) with far less noise.
        restart_every: steps between restarts.
        contrast: restarted only: the drift on w is contrast * difference / its running mean
            absolute value, so that it does not depend on the step size of theta.
        clip: restarted only: bound on the scaled difference.
    """
    restarted = auxiliary == "restarted"
    network = parts.sample_network()
    companion = sample_network(
        "auxiliary", parts.auxiliary, parts.prior,
        restart_from="theta", restart_every=restart_every if restarted else None,
    )
    forward = parts.forward(network, train, meta)
    auxiliary_loss = parts.loss(companion(train.input), train.target)
    gain = (auxiliary_loss - forward.train_loss).detach()
    if restarted:
        size = running_mean("gain", gain.abs().mean(), window=100, kind="exponential")
        gain = contrast * (gain / (size + 1e-12)).clamp(-clip, clip)
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
