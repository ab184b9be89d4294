"""Bayesian linear regression with fixed weights against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bads_ppl.data import Data
from bads_ppl.priors import NormalPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights
from models.joint import joint

REPLICAS, SCALE = 1000, 0.5


def squares(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((output - target) ** 2).sum(1)


class Regression:
    """REPLICAS regressions on the same 40 weighted and 5 meta inputs, each with its own targets."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(count, 2, generator=generator) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]])
            noise = torch.randn(count, REPLICAS, generator=generator)
            return x, x @ torch.tensor([[1.0], [-1.0]]) + noise

        (x, y), (mx, my) = draw(40), draw(5)
        self.w = torch.rand(40, generator=generator)
        self.train, self.meta = Data(x, y), Data(mx, my, name="meta")
        self.precision = torch.eye(2) / SCALE**2 + x.T @ (self.w[:, None] * x) + mx.T @ mx
        moment = x.T @ (self.w[:, None] * y) + mx.T @ my
        self.mean = torch.linalg.solve(self.precision, moment).T  # (R, 2)
        self.covariance = torch.linalg.inv(self.precision)

    def sample(self, eta: float, train_batch: int, steps: int) -> tuple[Tensor, Tensor]:
        """Mean (2,) of theta less the exact mean, and its covariance (2, 2), over all replicas."""
        network = nn.Linear(2, REPLICAS, bias=False)
        with torch.no_grad():
            network.weight.copy_(self.mean)
        parts = Parts(network, FixedWeights(self.w), loss=squares, prior=NormalPrior(SCALE))
        kernel = SGLD(
            bind(joint, parts),
            step_size=eta,
            train_batch=train_batch,
            meta_batch=5,
            generator=torch.Generator().manual_seed(1),
        )
        burn_in = steps // 5
        kernel.setup(burn_in, self.train, self.meta)
        shift, square, count = torch.zeros(2), torch.zeros(2, 2), 0
        for step in range(burn_in + steps):
            kernel.step()
            if step >= burn_in and step % 5 == 0:
                apart = network.weight.detach() - self.mean
                shift += apart.mean(0)
                square += apart.T @ apart / REPLICAS
                count += 1
        return shift / count, square / count


def test_mean_and_covariance_on_all_data():
    """The covariance is P^-1, to which a step adds what it is known to: (P (1 - eta P / 4))^-1."""
    problem, eta, steps = Regression(), 0.01, 1500
    shift, covariance = problem.sample(eta, 40, steps)
    slowest = float(torch.linalg.eigvalsh(problem.precision)[0])
    draws = REPLICAS * steps * eta * slowest / 4  # steps over the autocorrelation 4 / (eta lambda)
    sd = problem.covariance.diagonal().sqrt()
    assert (shift.abs() / sd).max() < 3 / math.sqrt(draws)
    discrete = problem.precision @ (torch.eye(2) - eta / 4 * problem.precision)
    error = 3 * math.sqrt(2 / draws) * torch.outer(sd, sd)
    assert ((covariance - torch.linalg.inv(discrete)).abs() < error).all()
    assert ((covariance / problem.covariance - 1).abs() < 0.12).all()


@pytest.mark.slow
def test_the_bias_of_minibatches_shrinks_with_the_step():
    """Of order eta: at a quarter of the step less than 0.4 of the bias is left."""
    problem = Regression()
    worst = {}
    for eta, steps in ((0.02, 1500), (0.005, 6000)):
        shift, covariance = problem.sample(eta, 8, steps)
        worst[eta] = float((covariance.diagonal() / problem.covariance.diagonal() - 1).max())
        sd = problem.covariance.diagonal().sqrt()
        assert (shift.abs() / sd).max() < 0.05  # replicas share their batches, and its noise
    assert 0.05 < worst[0.02] < 1
    assert worst[0.005] < 0.4 * worst[0.02]
