"""One small problem many times over, side by side in one program: many independent chains in one.

Replica r has one parameter theta_r, the loss (z - theta_r)^2 / 2, and its own points; points of a
set lie replica after replica. The gradient of one replica knows nothing of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bads_ppl.data import Data


class Locations(nn.Module):
    """Maps the number of a replica (B,) to its theta (B,)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.clone())

    def forward(self, replica: Tensor) -> Tensor:
        return self.value[replica]


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target) ** 2


def points(values: Tensor, name: str) -> Data:
    """A set with row r of `values` (R, K) as the points of replica r."""
    count, each = values.shape
    return Data(torch.arange(count).repeat_interleave(each), values.flatten(), name=name)
