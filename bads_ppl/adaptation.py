"""Step sizes that adapt during warm-up to an acceptance rate, and are frozen for the draws.

Every tenth step of warm-up a Robbins-Monro update moves the logarithm of each group's factor:

    log f <- log f + 2 k^(-0.6) (a - target),   a = acceptance probability on the step's batch

(Andrieu and Thoms, 2008). After warm-up nothing changes any more, so that the draws come from one
kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bads_ppl.acceptance import acceptance

if TYPE_CHECKING:
    from bads_ppl.kernel import MinibatchKernel

EVERY = 10
"""Steps between updates."""


class Adaptation:
    """Factors on the step sizes of groups.

    Args:
        target: acceptance rate to come near, in (0, 1); None: all factors stay 1.
        groups: names of the groups.
    """

    def __init__(self, target: float | None, groups: list[str]) -> None:
        self.target = target
        self.log_factors = dict.fromkeys(groups, 0.0)
        self.updates = 0

    def factor(self, group: str) -> float:
        """What the group's step size is multiplied by."""
        return math.exp(self.log_factors[group])

    def update(self, kernel: MinibatchKernel, train_rows: Tensor, meta_rows: Tensor) -> None:
        """Called after every step of warm-up with its rows, (B,) each (reads from the device)."""
        if self.target is None or kernel.steps % EVERY:
            return
        self.updates += 1
        train = kernel.train.batch(train_rows.unique())  # importance minibatches draw some twice
        found = acceptance(kernel, train, kernel.meta.batch(meta_rows), kernel.generator)
        for group, probability in found.items():
            self.log_factors[group] += 2 * self.updates**-0.6 * (probability - self.target)

    def state_dict(self) -> dict[str, Tensor]:
        values = [float(self.updates), *self.log_factors.values()]
        return {"values": torch.tensor(values, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        updates, *factors = state["values"].tolist()
        self.updates = int(updates)
        self.log_factors = dict(zip(self.log_factors, factors, strict=True))
