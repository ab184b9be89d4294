"""Mean weights of groups with intervals over draws."""

from __future__ import annotations

import numpy as np
import pytest

from bads_ppl import groups as module
from bads_ppl.draws import ChainDraws
from bads_ppl.errors import InputError
from bads_ppl.groups import group_means

CHAINS, DRAWS, POINTS = 2, 400, 30


@pytest.fixture
def chains() -> list[ChainDraws]:
    draw = np.random.default_rng(0)
    w = draw.beta(2, 5, (CHAINS, DRAWS, POINTS)).astype(np.float32)
    w[:, :, :10] *= draw.uniform(0.2, 1.0, (CHAINS, DRAWS, 1))  # these go up and down together
    return [ChainDraws(one, {}) for one in w]


def masks() -> dict[str, np.ndarray]:
    place = np.arange(POINTS)
    return {"together": place < 10, "alone": place >= 10, "some": place % 7 == 0}


def test_means_and_intervals_are_those_of_the_draws_means(chains, monkeypatch):
    monkeypatch.setattr(module, "_IN_MEMORY", 64 * POINTS)  # several blocks of draws
    found = group_means(chains, masks(), interval=0.8)
    for name, mask in masks().items():
        means = np.concatenate([one.w[:, mask].astype(float).mean(1) for one in chains])
        assert len(means) == CHAINS * DRAWS
        assert found[name].mean == pytest.approx(means.mean())
        assert found[name].low == pytest.approx(np.quantile(means, 0.1))
        assert found[name].high == pytest.approx(np.quantile(means, 0.9))
    wide, narrow = (found[name].high - found[name].low for name in ("together", "alone"))
    assert wide > 2 * narrow  # of points that move together a mean is no surer than one of them
    assert group_means(chains, {}) == {}


@pytest.mark.parametrize(
    ("groups", "interval", "message"),
    [
        ({"none": np.zeros(POINTS, bool)}, 0.9, "group 'none' must have .* and 0 points"),
        ({"short": np.ones(3, bool)}, 0.9, r"'short' must have .* 30 points .* got shape \(3,\)"),
        ({}, 1.0, r"interval must be a probability in \(0, 1\), got 1.0"),
    ],
)
def test_impossible_groups_are_refused(chains, groups, interval, message):
    with pytest.raises(InputError, match=message):
        group_means(chains, groups, interval)
