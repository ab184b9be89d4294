"""What Z(w) does to the posterior of w, where it can be integrated: `normalised` and `joint`
against quadrature over w.

theta ~ Normal(0, 2^2), two train points z_i with w_i ~ Uniform(0, 1), one meta point m; the losses
are (z - theta)^2 / 2, so theta given w is Gaussian with precision t = 1 / 4 + w_1 + w_2 and mean
(w_1 z_1 + w_2 z_2) / t, with Z(w) known.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from bads_ppl.priors import NormalPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import joint, normalised
from tests.exactness.replicas import Locations, half_square, points

REPLICAS, SCALE = 1000, 2.0
TRAIN, META = (2.0, -1.0), 2.5


def quadrature(*, normaliser: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd (2,) of w under its marginal posterior, on a grid of midpoints."""
    side = (np.arange(400) + 0.5) / 400
    w = np.stack(np.meshgrid(side, side, indexing="ij"))
    z = np.array(TRAIN)[:, None, None]
    precision = 1 / SCALE**2 + w.sum(0)
    mean = (w * z).sum(0) / precision
    variance = 1 / precision + 1
    log = -0.5 * np.log(variance) - 0.5 * (META - mean) ** 2 / variance  # p(m | w), normalised
    if not normaliser:  # times Z(w)
        log = log - 0.5 * np.log(precision) + 0.5 * precision * mean**2 - 0.5 * (w * z**2).sum(0)
    mass = np.exp(log - log.max())
    mass = mass / mass.sum()
    first = (mass * w).sum((1, 2))
    return first, np.sqrt((mass * w**2).sum((1, 2)) - first**2)


def sample(model, steps: int, eta_w: float) -> tuple[np.ndarray, np.ndarray]:
    start = torch.zeros(REPLICAS)
    train = points(torch.tensor(TRAIN).expand(REPLICAS, 2), "train")
    meta = points(torch.full((REPLICAS, 1), META), "meta")
    parts = Parts(Locations(start), InstanceWeights(), loss=half_square, prior=NormalPrior(SCALE))
    kernel = SGLD(
        bind(model, parts),
        step_size={"theta": 0.1, "w": eta_w},
        train_batch=len(train),
        meta_batch=len(meta),
        generator=torch.Generator().manual_seed(2),
    )
    kernel.setup(0, train, meta)
    first = square = torch.zeros(2)
    for step in range(steps + steps // 3):
        kernel.step()
        if step >= steps // 3:
            w = kernel.site_values().view(REPLICAS, 2)
            first = first + w.mean(0) / steps
            square = square + (w**2).mean(0) / steps
    return first.numpy(), (square - first**2).sqrt().numpy()


def test_dropping_the_normaliser_gives_another_posterior():
    with_it, _ = quadrature(normaliser=True)
    without, _ = quadrature(normaliser=False)
    assert np.abs(with_it - without).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "eta_w", "steps"),
    # theta' is known by one draw a step, which is noise in the drift of w: its steps are smaller
    [(joint, 0.1, 2000), (partial(normalised, auxiliary="persistent"), 0.02, 8000)],
    ids=["joint", "normalised"],
)
def test_the_posterior_of_w_is_that_of_quadrature(model, eta_w, steps):
    mean, sd = quadrature(normaliser=model is not joint)
    found_mean, found_sd = sample(model, steps, eta_w)
    # 1,000 chains of at least 10 independent draws each; the rest is the bias of the steps
    error = 3 * sd / math.sqrt(10 * REPLICAS) + 0.005
    assert (np.abs(found_mean - mean) < error).all()
    assert found_sd == pytest.approx(sd, rel=0.02)
