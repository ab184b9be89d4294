"""The baselines' model: theta is trained on a part of each batch, chosen by a score.

The train batch is a super-batch of B rows. All are scored, without gradients; k = share B of them
are kept and go through the forward pass with gradients, together with the meta batch:

    U = (N_t / B) sum_{i kept} l_i(theta) + sum_j l_j(theta) - log p(theta)

the potential of weights that are 1 for kept rows and 0 for the others. The choice is no latent and
has no density: draws of this program are an optimisation path, whatever the temperature of theta,
and HMC and NUTS do not apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyro
import torch
from torch import Tensor

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.primitives import sample_network, steps_taken
from bads_ppl.program import Parts
from bads_ppl.sites import evaluation_mode

SCORE, LEARNER = "score", "learner"
"""The site of a super-batch's scores, and the group of the second network's parameters."""


@dataclass(frozen=True)
class Share:
    """The share of each super-batch that is kept: max(floor, 0.5^(step / half_life)).

    Attributes:
        floor: in (0, 1], where it ends.
        half_life: > 0, steps in which it halves from 1; None: it is the floor throughout.

    Raises:
        InputError: for values outside of these ranges.
    """

    floor: float
    half_life: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise InputError(f"the share to keep must be in (0, 1], got {self.floor}")
        if self.half_life is not None and not self.half_life > 0:
            raise InputError(f"half_life must be a positive number of steps, got {self.half_life}")

    def __call__(self, step: int) -> float:
        """The share after `step` steps."""
        if self.half_life is None:
            return self.floor
        return max(self.floor, 0.5 ** (step / self.half_life))

    def count(self, step: int, size: int) -> int:
        """Rows to keep out of `size`, 1 at least."""
        return max(1, round(self(step) * size))


def selective(
    train: Batch,
    meta: Batch,
    parts: Parts,
    *,
    scores: Tensor,
    share: Share,
    loss_of: Literal["theta", "learner"] | None = None,
    temperature: float | None = None,
) -> None:
    """Train theta on the rows of each super-batch that score highest, and on the meta batch.

    Sites: theta.<parameter>, score (B,), and learner.<parameter> where there is one.

    Args:
        train: super-batch.
        meta: meta batch.
        parts: network, loss and prior; `parts.learner` where `loss_of` is "learner".
        scores: (N_t,) the part of every train point's score that stays as it is.
        share: the share of the super-batch to keep, over steps.
        loss_of: the network whose present loss is added to a row's score, in eval mode: "theta", or
            a "learner" that is trained along on the kept rows.
        temperature: of the choice: rows are drawn without replacement in proportion to
            softmax(score / temperature); more: nearer to uniform. None: the highest scores.

    Raises:
        InputError: if the temperature is not positive, or a learner is wanted and there is none.
    """
    if temperature is not None and not temperature > 0:
        raise InputError(f"the temperature of the choice must be positive, got {temperature}")
    network = parts.sample_network()
    score, module = scores[train.index], parts.network
    learner = network
    if loss_of == "learner":
        if parts.learner is None:
            raise InputError("loss_of='learner' needs a second network: give parts a learner")
        module = parts.learner
        learner = sample_network(LEARNER, module, parts.prior)
    if loss_of is not None:
        with torch.no_grad(), evaluation_mode(module):
            score = score + parts.loss(learner(train.input), train.target)
    score = pyro.deterministic(SCORE, score, event_dim=1)
    kept = train.keep(choose(score, share.count(steps_taken(), len(train)), temperature))
    forward = parts.forward(network, kept, meta)
    with kept.plate("train"):
        pyro.factor("train_loss", -parts.impact.train * forward.train_loss)
        if loss_of == "learner":
            loss = parts.loss(learner(kept.input), kept.target)
            pyro.factor("learner_loss", -parts.impact.train * loss)
    parts.observe_meta(forward.meta_output, meta, forward.meta_loss)


def choose(score: Tensor, count: int, temperature: float | None = None) -> Tensor:
    """Places (count,) of the highest scores (B,), or of rows drawn in proportion to their softmax.

    The draw is without replacement: the highest scores / temperature with Gumbel noise added
    (Vieira, 2014; Kool et al., 2019), from torch's global generator of the CPU, which a chain's
    checkpoint has. Of equal scores the first are taken.
    """
    if temperature is not None:
        noise = torch.empty(len(score)).exponential_().log_()
        score = score / temperature - noise.to(score.device)
    return score.argsort(descending=True, stable=True)[:count]


class Membership:
    """The weights of a draw: 1 for the share of the whole train set that scores highest, else 0.

    Args:
        share: the share that the program keeps of a super-batch.
    """

    def __init__(self, share: Share) -> None:
        self.share = share
        self._last: tuple[MinibatchKernel, int, Tensor] | None = None

    def scores(self, kernel: MinibatchKernel) -> Tensor:
        """Scores (N_t,) as they are now: a pass over the train set, once per step."""
        if self._last is None or self._last[0] is not kernel or self._last[1] != kernel.steps:
            self._last = kernel, kernel.steps, kernel.site_values(SCORE)
        return self._last[2]

    def __call__(self, kernel: MinibatchKernel) -> Tensor:
        """Weights (N_t,) of 0 and 1, as they are now."""
        score = self.scores(kernel)
        weights = torch.zeros_like(score)
        weights[choose(score, self.share.count(kernel.steps, len(score)))] = 1.0
        return weights
