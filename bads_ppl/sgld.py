"""Stochastic gradient Langevin dynamics, (6) and (7) (Welling and Teh, 2011).

    x <- x - eta / 2 * grad U(x) + sqrt(eta T) xi,    xi ~ Normal(0, 1)

The target is p^(1/T), up to a bias that vanishes with eta. It keeps no state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bads_ppl.kernel import MinibatchKernel, State


class SGLD(MinibatchKernel):
    """Stochastic gradient Langevin dynamics; see `MinibatchKernel` for the arguments."""

    def advance(self, group: str, values: list[Tensor], drift: list[Tensor], state: State) -> None:
        torch._foreach_add_(values, drift)
