"""Stochastic gradient Langevin dynamics, (6) and (7) (Welling and Teh, 2011).

    x <- x - eta / 2 * grad U(x) + sqrt(eta T) xi,    xi ~ Normal(0, 1)

The target is p^(1/T), up to a bias that vanishes with eta. It keeps no state.
"""

from __future__ import annotations

from bads_ppl.kernel import MinibatchKernel


class SGLD(MinibatchKernel):
    """Stochastic gradient Langevin dynamics; see `MinibatchKernel` for the arguments.

    It is what all kernels have in common: G is 1, and the values follow the drift.
    """
