"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin, 2014, equation 15).

    v <- (1 - a) v + a * (-eta / 2 * grad U(x) + sqrt(eta T) xi),    xi ~ Normal(0, 1)
    x <- x + v

a in (0, 1] is the friction. This is their update with the step size a eta / 2, so that eta means
what it means under SGLD: a gradient moves x by eta / 2 in all, spread over 1 / a steps, and with
a = 1 the two are the same. On a quadratic potential of curvature c the variance is too large by
the factor 1 / (1 - a c eta / (4 (2 - a))), which is SGLD's at a = 1 and less than it below. The
noise of the gradient is not estimated (their beta-hat is 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.moves import State


class SGHMC(MinibatchKernel):
    """Stochastic gradient Hamiltonian Monte Carlo; see `MinibatchKernel` for the other arguments.

    Args:
        friction: a in (0, 1], for all groups or per group. Groups that are not named take 0.1, but
            local sites 1: a row that is visited now and then carries no momentum.

    Raises:
        InputError: for values outside of the ranges, at `setup` too for a friction below 1 of
            local sites with importance minibatches: their step depends on the weights, and
            momentum would then not keep the target.
    """

    def __init__(self, *args: Any, friction: float | Mapping[str, float] = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for value in friction.values() if isinstance(friction, Mapping) else [friction]:
            if not 0 < value <= 1:
                raise InputError(f"friction must be in (0, 1], got {value}: 1 is SGLD")
        self.friction = friction

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        self.frictions: dict[str, float] = {}
        super().setup(warmup_steps, *args, **kwargs)

    def init(self, group: str, values: list[Tensor]) -> State:
        local = group in self.latents.tables
        if isinstance(self.friction, Mapping):
            groups = self.latents.groups()
            friction = self._per_group("friction", self.friction, groups, None)[group]
            friction = friction if friction is not None else (1.0 if local else 0.1)
        else:
            friction = 1.0 if local else self.friction
        if local and friction < 1 and self.minibatches == "importance":
            raise InputError(
                f"friction of {group!r} must be 1 with minibatches='importance', got {friction}: "
                "leave it out, or use minibatches='uniform'"
            )
        self.frictions[group] = friction
        return {} if friction == 1 else {"velocity": [torch.zeros_like(v) for v in values]}

    def langevin_rate(self, group: str) -> float:
        """Eta a / (2 - a) with friction a: see the variance in the docstring of this module."""
        friction = self.frictions[group]
        return super().langevin_rate(group) * friction / (2 - friction)

    def advance(self, group: str, values: list[Tensor], drift: list[Tensor], state: State) -> None:
        friction = self.frictions[group]
        if friction == 1:
            torch._foreach_add_(values, drift)
            return
        torch._foreach_mul_(state["velocity"], 1 - friction)
        torch._foreach_add_(state["velocity"], drift, alpha=friction)
        torch._foreach_add_(values, state["velocity"])
