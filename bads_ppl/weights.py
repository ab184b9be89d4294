"""Where the weights w_i in [0, 1] come from: one latent per point, a network, or fixed values.

Each class has one method that programs call, `sample(train, plate, features)`, which returns the
batch's weights (B,). A user's own class needs no more than that and `needs_features`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from bads_ppl.data import Batch, ScaledPlate
from bads_ppl.errors import InputError
from bads_ppl.primitives import NetworkPrior, sample_network
from bads_ppl.priors import NormalPrior

SITE = "w"
"""The site whose values are the weights, in every program and every file."""


class Weights(Protocol):
    """What programs ask of a source of weights."""

    @property
    def needs_features(self) -> bool:
        """Whether `sample` wants the network's top-layer embedding of the batch."""
        ...

    def sample(self, train: Batch, plate: ScaledPlate, features: Tensor | None) -> Tensor:
        """The weights (B,) of the batch's rows; enters `plate` for what is local to a row."""
        ...


class _Beta(dist.Beta):
    """Beta(a, b) of two numbers, with what its density needs of them worked out ahead."""

    a: float
    b: float
    log_normaliser: float

    @classmethod
    def of(cls, a: float, b: float, count: int, device: torch.device) -> _Beta:
        """For `count` points."""
        first, second = (torch.full((), x, device=device).expand(count) for x in (a, b))
        made = cls(first, second, validate_args=False)
        made.a, made.b = a, b
        made.log_normaliser = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return made

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Beta:
        made: _Beta = super().expand(batch_shape, _instance)  # type: ignore[no-untyped-call]
        made.a, made.b, made.log_normaliser = self.a, self.b, self.log_normaliser
        return made

    def log_density_of_logit(self, logit: Tensor, w: Tensor, temperature: float) -> Tensor:
        """Log p(w) + T log|dw/du| (B,) at w = sigmoid(u), u the logit (B,).

        Its derivative is taken in u alone, that of w is left out; u is within `Logit.LIMITS`, where
        w is neither 0 nor 1.
        """
        a, b = self.a - 1 + temperature, self.b - 1 + temperature
        density: Tensor = _LogDensityOfLogit.apply(logit, w, a, b)
        return density - self.log_normaliser


class _LogDensityOfLogit(torch.autograd.Function):
    """a log w + b log(1 - w) at w = sigmoid(u), where log(1 - w) = log w - u."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor, w: Tensor, a: float, b: float) -> Tensor:
        ctx.save_for_backward(w)
        ctx.exponents = a, b
        return torch.sub((a + b) * w.log(), logit, alpha=b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        a, b = ctx.exponents
        return grad * torch.rsub(w, a, alpha=a + b), None, None, None


@lru_cache(maxsize=8)
def _beta(mean: float, concentration: float, count: int, device: torch.device) -> dist.Beta:
    """Beta(a, a (1 - mean) / mean) of `count` points, built once: no step builds it or copies it.

    It has the shape of the plate, so that no step expands it either.
    """
    return _Beta.of(concentration, concentration * (1 - mean) / mean, count, device)


@dataclass(frozen=True)
class InstanceWeights:
    """One latent weight per train point, w_i ~ Beta(a, a (1 - mean) / mean).

    Attributes:
        mean: prior mean of a weight, in (0, 1), and the value at which every weight starts. 0.5
            with concentration 1 is the uniform prior. Where the sparsity beta is small, take
            mean = beta: under a uniform prior the many small weights would pull the total up.
        concentration: a > 0; below 1 mass moves to 0 (trap 10: contrast is a modelling choice).
    """

    mean: float = 0.5
    concentration: float = 1.0
    needs_features: bool = False

    def __post_init__(self) -> None:
        if not self.concentration > 0:
            raise InputError(f"concentration must be positive, got {self.concentration}")
        if not 0 < self.mean < 1:
            raise InputError(f"the prior mean of a weight must be in (0, 1), got {self.mean}")

    def sample(self, train: Batch, plate: ScaledPlate, features: Tensor | None = None) -> Tensor:
        prior = _beta(self.mean, self.concentration, len(train), train.target.device)
        with plate:
            w: Tensor = pyro.sample(SITE, prior, infer={"initial": self.mean})  # type: ignore[arg-type]
        return w


class WeightNetwork(nn.Module):
    """w_i = sigmoid(g(h_i; phi)): a linear layer on the network's top-layer embedding h_i.

    h_i is detached: the train data reach the backbone through the loss only. It is scaled to length
    1, so that the step of phi does not depend on how large a backbone's embeddings are. phi is
    latent, with a Gaussian prior on its departure from w = initial. The network scores points it
    has not seen.

    Args:
        features: width of the embedding h_i.
        classes: > 0 appends the one-hot label of that many classes to h_i.
        initial: the weight that every point starts with, in (0, 1).
        prior: prior of phi; default Normal(0, 3), which reaches from w = .005 to w = .5.
    """

    needs_features = True

    def __init__(
        self,
        features: int,
        classes: int = 0,
        *,
        initial: float = 0.5,
        prior: NetworkPrior | None = None,
    ) -> None:
        super().__init__()
        if not 0 < initial < 1:
            raise InputError(f"initial weight must be in (0, 1), got {initial}")
        self.classes = classes
        self.offset = float(torch.logit(torch.tensor(initial)))
        self.linear = nn.Linear(features + classes, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.prior = prior if prior is not None else NormalPrior(3.0)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Weights (B,) for embeddings (B, features) and, with `classes` > 0, labels (B,)."""
        features = functional.normalize(features, dim=1)
        if self.classes:
            labels = functional.one_hot(target, self.classes).to(features.dtype)
            features = torch.cat([features, labels], dim=1)
        logit: Tensor = self.linear(features).squeeze(1)
        return torch.sigmoid(logit + self.offset)

    def sample(self, train: Batch, plate: ScaledPlate, features: Tensor | None) -> Tensor:
        if features is None:
            raise InputError("a weight network needs the embedding of the batch, got None")
        network: Any = sample_network("phi", self, self.prior)
        with plate:
            return pyro.deterministic(SITE, network(features, train.target), event_dim=0)


@dataclass(frozen=True)
class FixedWeights:
    """Given weights, with nothing to learn: the baselines, and checks with known answers.

    Attributes:
        values: (N,) one weight per train point, >= 0.
    """

    values: Tensor
    needs_features: bool = False

    def sample(self, train: Batch, plate: ScaledPlate, features: Tensor | None = None) -> Tensor:
        with plate:
            return pyro.deterministic(SITE, self.values[train.index], event_dim=0)
