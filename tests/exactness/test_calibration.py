"""Simulation-based calibration (Talts et al., 2018) of the joint model.

theta and w are drawn from p(theta, w | D_t) exactly: theta from a grid, w given theta by inversion.
A meta set is drawn given theta. Among draws from the sampler's posterior given that meta set, the
rank of what was drawn is uniform.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bads_ppl.priors import NormalPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import joint
from tests.exactness.replicas import Locations, half_square, points

REPLICAS, SCALE, DRAWS = 1000, 2.0, 23
TRAIN = np.array([-2.0, 0.5, 2.0])


def simulate(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """theta (R,) and w (R, 3) from p(theta, w | D_t), and meta points (R, 1) given theta."""
    grid = np.linspace(-10, 10, 20_001)
    loss = np.maximum(0.5 * (TRAIN[:, None] - grid) ** 2, 1e-12)
    log = -0.5 * (grid / SCALE) ** 2 + np.log(-np.expm1(-loss) / loss).sum(0)  # w integrated out
    mass = np.exp(log - log.max())
    theta = rng.choice(grid, REPLICAS, p=mass / mass.sum())
    loss = 0.5 * (TRAIN - theta[:, None]) ** 2 + 1e-12
    w = -np.log1p(rng.random(loss.shape) * np.expm1(-loss)) / loss
    return theta, w, theta[:, None] + rng.standard_normal((REPLICAS, 1))


def ranks(temperature: float) -> dict[str, np.ndarray]:
    """Ranks (R,) from 0 to DRAWS of the true theta, of each w and of the weighted train loss."""
    theta, w, meta = simulate(np.random.default_rng(0))
    train = points(torch.tensor(TRAIN).float().expand(REPLICAS, 3), "train")
    network = Locations(torch.zeros(REPLICAS))
    parts = Parts(network, InstanceWeights(), loss=half_square, prior=NormalPrior(SCALE))
    kernel = SGLD(
        bind(joint, parts),
        step_size={"theta": 0.03, "w": 0.3},
        temperature=temperature,
        train_batch=len(train),
        meta_batch=REPLICAS,
        generator=torch.Generator().manual_seed(3),
    )
    kernel.setup(0, train, points(torch.tensor(meta).float(), "meta"))

    def quantities(theta: Tensor, w: Tensor) -> Tensor:
        loss = (0.5 * w * (torch.tensor(TRAIN).float() - theta[:, None]) ** 2).sum(1)
        return torch.stack([theta, *w.T, loss])

    true = quantities(torch.tensor(theta).float(), torch.tensor(w).float())
    below = torch.zeros_like(true)
    for step in range(1, 480 + 80 * DRAWS + 1):
        kernel.step()
        if step > 480 and step % 80 == 0:
            drawn = quantities(network.value.detach(), kernel.site_values().view(REPLICAS, 3))
            below += drawn < true
    names = ("theta", "w_1", "w_2", "w_3", "loss")
    return {name: rank.numpy().astype(int) for name, rank in zip(names, below, strict=True)}


def p_value(rank: np.ndarray) -> float:
    """Of uniform ranks, by a chi-squared test on 12 bins of two ranks each."""
    counts = np.bincount(rank // 2, minlength=(DRAWS + 1) // 2)
    return float(stats.chisquare(counts).pvalue)


@pytest.mark.slow
def test_ranks_are_uniform():
    found = {name: p_value(rank) for name, rank in ranks(1.0).items()}
    assert min(found.values()) > 0.01 / len(found), found


@pytest.mark.slow
def test_ranks_show_a_posterior_that_is_too_narrow():
    assert p_value(ranks(0.5)["theta"]) < 1e-6
