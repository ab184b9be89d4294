"""Mean, standard deviation and share above one half of every weight, from draws of any size.

Draws are read points by points, a bounded part at a time, so that beside the results, 12 bytes a
point, little memory is needed whatever the number of points and draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bads_ppl.errors import InputError

PIECE = 2**23
"""Draws of a chain that are worked on at a time: 64 MiB as float64."""


class Moments(NamedTuple):
    """Statistics of each weight over the draws of all chains, each (N,) float32 and read-only."""

    mean: NDArray[np.float32]
    sd: NDArray[np.float32]  # divisor: draws - 1; 0 for one draw
    above: NDArray[np.float32]  # share of draws above 0.5


def moments(chains: Sequence[NDArray[Any]], ids: NDArray[np.int64]) -> Moments:
    """Statistics of the draws (D_c, N) of all chains, which may be memory-mapped.

    Sums are of float64; results are rounded to float32, as draws are.

    Args:
        chains: draws of each chain, one at least.
        ids: (N,) the points' ids, for messages.

    Raises:
        InputError: if a draw is not finite.
    """
    count = sum(len(chain) for chain in chains)
    results = Moments(*(np.empty(len(ids), dtype=np.float32) for _ in Moments._fields))
    step = max(1, PIECE // max(len(chain) for chain in chains))
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        origin = np.asarray(chains[0][0, part], dtype=np.float64)  # departures do not cancel
        first, second, above = np.zeros((3, len(origin)))
        for number, chain in enumerate(chains):
            block = np.asarray(chain[:, part])
            _check_finite(block, number, ids[part])
            above += (block > 0.5).sum(axis=0)
            block = block - origin
            first += block.sum(axis=0)
            second += np.einsum("dn,dn->n", block, block)
        spread = np.maximum(second - first**2 / count, 0) / max(count - 1, 1)
        for result, found in zip(
            results, (origin + first / count, np.sqrt(spread), above / count), strict=True
        ):
            result[part] = found
    for result in results:
        result.flags.writeable = False
    return results


def _check_finite(block: NDArray[Any], chain: int, ids: NDArray[np.int64]) -> None:
    finite = np.isfinite(block)
    if finite.all():
        return
    draw, point = np.argwhere(~finite)[0]
    raise InputError(
        f"draws must be finite, got {block[draw, point]} for id {ids[point]} in draw {draw} of "
        f"chain {chain}: the chain diverged; run it with smaller steps"
    )
