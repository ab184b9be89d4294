"""The paper's model: theta and w jointly, without the normaliser of (2).

The energy is U = sum_i w_i l_i(theta) + sum_j l_j(theta) - log p(theta) - log p(w). The weighted
train term is a `pyro.factor`, since exp(-w l) is not a normalised density of the train targets. A
point loses weight in proportion to its own loss, so wrong labels are found and rare classes are
missed. NUTS runs on the same program with all data.
"""

import pyro

from bads_ppl.data import Batch
from bads_ppl.priors import TotalPrior
from bads_ppl.program import Parts


def joint(train: Batch, meta: Batch, parts: Parts, *, prior: TotalPrior | None = None) -> None:
    """p(theta, w | D_t, D_m) as in (4) with Z(w) left out.

    Sites: theta.<parameter>, w (and phi.<parameter> for a weight network). `prior` is that of the
    total weight, `parts.sparsity` unless given.
    """
    network = parts.sample_network()
    forward = parts.forward(network, train, meta)
    plate = train.plate("train")
    w = parts.weights.sample(train, plate, forward.features)
    with plate:
        pyro.factor("train_loss", parts.weigh(w, forward.train_loss))
    prior = prior if prior is not None else parts.sparsity
    if prior is not None:
        prior.factor(w, train)
    parts.observe_meta(forward.meta_output, meta, forward.meta_loss)
