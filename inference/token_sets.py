"""Sets of padded token ids, cut from one that has them all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bads_ppl.data import Data


def token_sets(
    padded: Mapping[str, Tensor], lengths: Tensor, sizes: Mapping[str, int]
) -> dict[str, Data]:
    """Sets one after the other, with ids that count through them.

    Args:
        padded: `ids`, `mask` and `labels` of all rows, in the order of the sets.
        lengths: (N,) tokens of each row.
        sizes: rows of each set, by name.
    """
    found, start = {}, 0
    for name, size in sizes.items():
        rows = slice(start, start + size)
        start = rows.stop
        found[name] = Data(
            {key: x[rows] for key, x in padded.items()},
            padded["labels"][rows],
            torch.arange(rows.start, rows.stop),
            name=name,
            lengths=lengths[rows],
        )
    return found
