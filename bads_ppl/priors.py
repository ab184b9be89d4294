"""Priors: of network parameters (weight decay), and of how many points are selected (8).

The prior of a single weight belongs to the weights (`bads_ppl.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as functional
from torch import Tensor

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import plate_sum, running_mean


class TotalPrior(Protocol):
    """What models ask of a prior on the total weight."""

    @property
    def sparsity(self) -> float | Tensor:
        """Beta in (0, 1), the share to select; a constant under differentiation."""
        ...

    def factor(self, w: Tensor, train: Batch) -> None:
        """Add its log density to the program, given the batch's weights (B,)."""
        ...


def default_scale(points: float) -> float:
    """A sd for all parameters of a network, where `points` count: (sum of weights) + (meta points).

    min(0.5, 10 / sqrt(points)): weight decay 1 / scale^2 of one per hundred points, so that the
    mean loss meets the same decay however many points there are, and 4 at least. It suited LeNet5
    with 100 to 20,000 points (docs/results.md).
    """
    return min(0.5, 10 / math.sqrt(points))


def default_temperature(points: float) -> float:
    """A temperature of theta for training, max(0.001, 3e-6 points), chosen with `default_scale`."""
    return max(1e-3, 3e-6 * points)


@dataclass(frozen=True)
class NormalPrior:
    """Zero-mean Gaussian on every parameter, p(theta) in (4): weight decay 1 / scale^2.

    Attributes:
        scale: standard deviation, > 0.
        scales: standard deviations of single parameters by name, in place of `scale`.
    """

    scale: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (self.scale, *self.scales.values()):
            if not (math.isfinite(value) and value > 0):
                raise InputError(
                    f"a prior scale must be a positive number, got {value} "
                    "(a standard deviation; weight decay is 1 / scale^2)"
                )

    def __call__(self, name: str, parameter: Tensor) -> Any:
        scale = torch.as_tensor(
            self.scales.get(name, self.scale), dtype=parameter.dtype, device=parameter.device
        )
        return dist.Normal(torch.zeros_like(scale), scale).expand(parameter.shape).to_event()


@dataclass(frozen=True)
class SparsityPrior:
    """The prior (8) on the total weight: sum_i w_i ~ Normal(floor(N_t beta), sigma^2), up to a
    constant.

    Attributes:
        sparsity: beta, the share of the train set to select, in (0, 1).
        scale: sigma in points, > 0: how strictly the total is held. None: 2 % of the target,
            but half a point at least.
        total: "exact" sums over all points (`plate_sum`); "running_mean" is the paper's (9): the
            batch's own sum plus the mean of the last 10 batches' means for the other points,
            which is plugged in as if it were constant. It pulls the weights together by an
            added curvature of about N_t / (|B| sigma^2).
    """

    sparsity: float
    scale: float | None = None
    total: Literal["exact", "running_mean"] = "exact"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InputError(
                f"sparsity must be in (0, 1), got {self.sparsity} (a share of the train set; "
                f"for {self.sparsity:g} points use {self.sparsity:g} / len(train))"
            )
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(
                f"sparsity_scale must be a positive number of points, got {self.scale}: larger "
                "holds the total weight less strictly"
            )
        if self.total not in ("exact", "running_mean"):
            raise InputError(f"total must be 'exact' or 'running_mean', got {self.total!r}")

    def target(self, size: int) -> int:
        """floor(N_t beta): the number of points that the prior selects out of `size`.

        Raises:
            InputError: if that is less than one point.
        """
        points = math.floor(size * self.sparsity + 1e-9)  # 0.29 * 100 is 28.999...
        if points < 1:
            raise InputError(
                f"sparsity {self.sparsity} of {size} points is less than one point: use at least "
                f"{1 / size:.2g}"
            )
        return points

    def factor(self, w: Tensor, train: Batch) -> None:
        """Add log p(w) of (8) to the program, given the batch's weights (B,)."""
        target = self.target(train.size)
        scale = self.scale if self.scale is not None else max(0.02 * target, 0.5)
        if self.total == "exact":
            total = plate_sum("total_weight", w, train)
        else:
            # The batch's mean, corrected where rows were not drawn uniformly.
            mean = running_mean("mean_weight", train.total(w) / train.size, window=10)
            rest = (train.size - len(train.whole)) * mean
            # The value is (9); the derivative is the plate's, as everywhere (docs/conventions.md).
            spread = train.total(w)
            own = train.ranks.size * train.ranks.mean(w.sum())
            total = own + rest + (spread - spread.detach())
        squared = functional.mse_loss(total, _constant(target, total.dtype, total.device))
        pyro.factor("sparsity", squared * (-0.5 / scale**2))


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number () on a device, built once and kept: recorded steps read it where it is."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)
