"""Mean weights of groups of points: of a source of the data, say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bads_ppl.draws import Draws
from bads_ppl.errors import InputError

_IN_MEMORY = 2**26  # values of a block of draws


@dataclass(frozen=True)
class GroupMean:
    """The mean weight of a group's points.

    Attributes:
        mean: over the draws of all chains.
        low: lower end of the central interval of the draws' mean weights.
        high: its upper end.
    """

    mean: float
    low: float
    high: float


def group_means(
    chains: Sequence[Draws], groups: Mapping[str, NDArray[np.bool_]], interval: float = 0.95
) -> dict[str, GroupMean]:
    """Mean weights of groups, with intervals over the draws of all chains together.

    The interval is about the mean of the group, which is far surer than the weight of a point; it
    is evidence as far as the draws are (`bads_ppl.chains.evidence`).

    Args:
        chains: of a run, each with draws (D, N) of the weights.
        groups: name to (N,), whether a point is in it; they may overlap.
        interval: probability that intervals cover, in (0, 1).

    Raises:
        InputError: if a group is empty or of another size, or `interval` out of range.
    """
    if not 0 < interval < 1:
        raise InputError(f"interval must be a probability in (0, 1), got {interval}")
    size = chains[0].w.shape[1]
    for name, mask in groups.items():
        if mask.shape != (size,) or not mask.any():
            raise InputError(
                f"group {name!r} must have one truth value for each of {size} points and one point "
                f"at least, got shape {mask.shape} and {int(mask.sum())} points"
            )
    if not groups:
        return {}
    shares = np.stack([mask / mask.sum() for mask in groups.values()], axis=1)
    rows = max(1, _IN_MEMORY // size)
    means = np.concatenate(
        [
            np.asarray(chain.w[start : start + rows], dtype=np.float64) @ shares
            for chain in chains
            for start in range(0, len(chain.w), rows)
        ]
    )
    ends = np.quantile(means, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
    return {
        name: GroupMean(float(means[:, k].mean()), *map(float, ends[:, k]))
        for k, name in enumerate(groups)
    }
