"""What a method does with a task, as data: the program, its weights, and the points that count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bads_ppl.data import Data
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Impact, Model
from bads_ppl.weights import FixedWeights, Weights
from inference.proxies import Proxies
from inference.tasks import Task
from models.joint import joint
from models.selective import Membership


@dataclass(frozen=True)
class Setup:
    """What a method does with a task.

    Attributes:
        model: the Pyro program.
        weights: builds a chain's weights from its network.
        sparsity: prior on the total weight, None for fixed weights.
        impact: impact constants.
        points: how many points count in the potential, (sum of weights) + (meta points): a
            learning rate on the mean loss is eta = 2 learning_rate / points.
        train: the train points that the kernel sees.
        fixed: (N_t,) the weights where they are fixed, for all points of the task.
        optimises: the weights are optimised, their temperature is 0.
        names: model and weights, as recorded in the results.
        membership: the weights of a draw, where theta trains on the part of each batch that scores
            highest.
        scores: (N_t,) scores that were known ahead, on the CPU; more: selected first. Where theta
            trains on a part of each batch they are what stays the same of the scores.
        train_batch: rows of the train set that a step chooses from, where it chooses.
        learner: builds a chain's second network, which takes theta's step size.
        prepare: makes the setup with scores from the one where all are equal: trains proxies.
    """

    model: Model
    weights: Callable[[nn.Module], Weights]
    sparsity: SparsityPrior | None
    impact: Impact
    points: float
    train: Data
    fixed: Tensor | None = None
    optimises: bool = False
    names: tuple[str, str] = ("joint", "fixed")
    membership: Membership | None = None
    scores: Tensor | None = None
    train_batch: int | None = None
    learner: Callable[[], nn.Module] | None = None
    prepare: Callable[[], Setup] | None = None

    @property
    def latent(self) -> bool:
        """Whether the weights are latent (or optimised) values of the program."""
        return self.fixed is None and self.membership is None

    @property
    def digest(self) -> str | None:
        """A hash of the scores, so that a run is not resumed with others; None without."""
        if self.scores is None:
            return None
        return hashlib.blake2b(self.scores.cpu().numpy().tobytes(), digest_size=8).hexdigest()

    def prepared(self) -> Setup:
        """The setup to run: its scores are known."""
        return self if self.prepare is None else self.prepare()

    def step_factor(self, step: int) -> float:
        """What a step size for `points` points is multiplied by where a step counts others."""
        if self.membership is None:
            return 1.0
        share, size = self.membership.share, len(self.train)
        rest = self.points - share.floor * size
        return self.points / (share(step) * size + rest)


@dataclass(frozen=True)
class Given:
    """What every method is given beside the task, and its own options.

    Attributes:
        model: the Pyro program of BADS, or of the method where it has one of its own.
        weights: builds the latent weights of a chain from its network.
        sparsity: prior on their total; its beta is the share that every method selects.
        impact: impact constants of BADS.
        names: model and weights, as the configuration calls them.
        seed: source of a method's own randomness.
        proxies: trains proxies and scores the train points with them.
        train_batch: train rows that theta is trained on in a step; None: 100, or all.
    """

    model: Model
    weights: Callable[[nn.Module], Weights]
    sparsity: SparsityPrior
    impact: Impact
    names: tuple[str, str]
    seed: int
    proxies: Proxies
    train_batch: int | None = None


def chosen(task: Task, rows: Tensor) -> Setup:
    """Weight 1 for these rows and 0 for the others, which the kernel does not see."""
    rows = rows.sort().values
    weights = torch.zeros(len(task.train))
    weights[rows] = 1.0
    return Setup(
        joint,
        always(FixedWeights(torch.ones(len(rows)))),
        None,
        Impact(),
        len(rows) + len(task.meta),
        task.train.subset(rows),
        weights,
    )


def fixed(task: Task, weights: Tensor, impact: Impact | None = None) -> Setup:
    """These weights (N_t,) for all train points."""
    impact = impact or Impact()
    points = float(weights.sum()) + impact.meta * len(task.meta)
    return Setup(joint, always(FixedWeights(weights)), None, impact, points, task.train, weights)


def always(weights: FixedWeights) -> Callable[[nn.Module], Weights]:
    """Builds these weights for every chain, on its network's device."""

    def build(network: nn.Module) -> Weights:
        device = next(network.parameters()).device
        return FixedWeights(weights.values.to(device))

    return build
