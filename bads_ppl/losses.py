"""Per-example losses, and the observed distribution that each of them stands for.

The train term uses a loss as it is, exp(-w l) (2); the meta data are observed (3), so a loss must
also be a distribution. Cross-entropy is the Categorical; any other loss becomes the
(unnormalised) distribution with log p(y | output) = -loss(output, y).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as functional
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import lazy_property

Loss = Callable[[Any, Tensor], Tensor]
"""Maps outputs (B, ...) and targets (B, ...) to one loss per example, shape (B,)."""


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy (B,) in nats of logits (B, C) for classes (B,) in 0 to C - 1."""
    return functional.cross_entropy(output, target, reduction="none")


class LossDistribution(TorchDistribution):
    """The likelihood that a loss stands for: log p(y | output) = -loss(output, y), (3).

    It cannot be sampled, and it is normalised only where the loss is a negative log-likelihood.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real

    def __init__(self, output: Any, loss: Loss, batch_size: int) -> None:
        self.output = output
        self.loss = loss
        super().__init__(torch.Size((batch_size,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LossDistribution:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"a loss over {self.batch_shape} cannot expand to {batch_shape}")
        return self

    def log_prob(self, value: Tensor) -> Tensor:
        return -self.loss(self.output, value)


class Classes(dist.Categorical):
    """The Categorical of logits (B, C), whose log-probability of classes (B,) is one fused call.

    Logits are normalised when something else asks for them.

    Args:
        output: the logits.
        known: classes (B,), as the same tensor, and their cross-entropy (B,), where that was worked
            out already.
    """

    def __init__(self, output: Tensor, known: tuple[Tensor, Tensor] | None = None) -> None:
        self.output = output
        self.known = known
        self._num_events = output.shape[-1]
        Distribution.__init__(self, output.shape[:-1], validate_args=False)

    @lazy_property
    def logits(self) -> Tensor:
        return self.output.log_softmax(-1)

    @property
    def _param(self) -> Tensor:  # type: ignore[override]
        logits: Tensor = self.logits
        return logits

    def expand(self, batch_shape: Any, _instance: Any = None) -> Classes:
        return Classes(self.output.expand(*batch_shape, self._num_events))

    def log_prob(self, value: Tensor) -> Tensor:
        if self.known is not None and value is self.known[0]:
            return -self.known[1]
        if value.dtype == torch.long and value.shape == self.batch_shape and value.ndim == 1:
            return -cross_entropy(self.output, value)
        log_prob: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
        return log_prob


def observe(
    loss: Loss, output: Any, batch_size: int, known: tuple[Tensor, Tensor] | None = None
) -> TorchDistribution:
    """The distribution of the meta targets given the network's output for them.

    `known` are targets (B, ...) and their losses (B,), where those were worked out already.
    """
    if loss is cross_entropy:
        return Classes(output, known)
    return LossDistribution(output, loss, batch_size)
