"""Cyclical SGLD (Zhang et al., 2020): large steps to find a mode, small ones to sample it, again.

    eta_k = eta * (cos(pi (k mod cycle) / cycle) + 1) / 2

The first part of every cycle explores, with gradient steps without noise and no draws. The rest is
SGLD.
"""

from __future__ import annotations

import math
from typing import Any

from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel


class CyclicalSGLD(MinibatchKernel):
    """SGLD with cyclical step sizes; see `MinibatchKernel` for the other arguments.

    Args:
        cycle: steps per cycle, at least 2. `step_size` is the largest of a cycle.
        exploration: share of a cycle that explores, in [0, 1).

    Raises:
        InputError: for values outside of the ranges.
    """

    def __init__(self, *args: Any, cycle: int = 250, exploration: float = 0.25, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if cycle < 2:
            raise InputError(f"cycle must be at least 2 steps, got {cycle}")
        if not 0 <= exploration < 1:
            raise InputError(
                f"exploration must be in [0, 1), got {exploration}: the share of a cycle without "
                "draws"
            )
        self.cycle = cycle
        self.exploration = exploration

    def position(self, step: int) -> float:
        """Where a step (from 0) stands in its cycle, in [0, 1)."""
        return step % self.cycle / self.cycle

    @property
    def evidence(self) -> str:
        """Exploring steps lead away from the target: what follows them is "approximate"."""
        found = super().evidence
        return "approximate" if found == "calibrated" and self.exploration > 0 else found

    def rate(self, group: str) -> float:
        wave = 0.5 * (math.cos(math.pi * self.position(self.steps)) + 1)
        return super().rate(group) * wave

    def heat(self, group: str) -> float:
        exploring = self.position(self.steps) < self.exploration
        return 0.0 if exploring else super().heat(group)

    def draws_at(self, step: int) -> bool:
        return self.position(step - 1) >= self.exploration
