"""Our numbers are those of ArviZ, for any number of chains, draws and points, and any ties."""

import warnings

import numpy as np
import pytest
from scipy.signal import lfilter

from bads_ppl import convergence
from bads_ppl.convergence import estimate

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz


def make_draws(kind, chains, draws, points=4, seed=0):
    """Draws (C, D, N) of a kind that stresses one part of the estimators."""
    generator = np.random.default_rng([seed, chains, draws])
    x = generator.standard_normal((chains, draws, points))
    memory = {"slow": 0.9, "alternating": -0.7, "shifted": 0.3}.get(kind, 0.0)
    x = lfilter([1], [1, -memory], x, axis=1)
    if kind == "ties":
        x = np.round(2 * x) / 2
    if kind == "heavy":
        x = np.exp(3 * x)
    if kind == "shifted":
        x += np.arange(chains)[:, None, None]
    if kind == "resting":  # a row that is seldom in the minibatch repeats its value
        moves = generator.random(x.shape) < 0.4
        moves[:, 0] = True
        last = np.maximum.accumulate(np.where(moves, np.arange(draws)[:, None], 0), axis=1)
        x = np.take_along_axis(x, last, axis=1)
    return x


def reference(x):
    """ArviZ's numbers of (C, D) draws, as ArviZ 0.23 and 1.x give them."""
    return {
        "rhat": float(arviz.rhat(x)) if len(x) > 1 else np.nan,
        "ess_bulk": float(arviz.ess(x, method="bulk")),
        "ess_tail": float(arviz.ess(x, method="tail", prob=(0.05, 0.95))),
        "mcse_mean": float(arviz.mcse(x, method="mean")),
        "mcse_sd": float(arviz.mcse(x, method="sd")),
        "mean": x.mean(),
        "sd": x.std(ddof=1),
    }


KINDS = ("independent", "slow", "alternating", "ties", "heavy", "shifted", "resting")


# Where the number of all draws is one more than a multiple of 20, the 5 % and 95 % quantiles are
# draws themselves, and ArviZ's interpolation may miss them by a rounding error: none such is here.
@pytest.mark.parametrize(("chains", "draws"), [(1, 50), (2, 30), (2, 33), (3, 101), (4, 75)])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_arviz(kind, chains, draws):
    x = make_draws(kind, chains, draws)
    found = estimate(list(x))
    for point in range(x.shape[2]):
        for name, value in reference(x[..., point]).items():
            ours = getattr(found, name)[point]
            # The same sums in another order: rounding errors only.
            assert ours == pytest.approx(value, rel=1e-8, nan_ok=True), name


@pytest.mark.parametrize("draws", [4, 5, 6, 7, 8, 9, 11])
def test_the_shortest_chains_give_arvizs_numbers(draws):
    x = make_draws("independent", 4, draws, points=20)
    found = estimate(list(x))
    for point in range(20):
        for name, value in reference(x[..., point]).items():
            ours = getattr(found, name)[point]
            if name == "ess_tail" and np.isnan(ours):
                # Both quantiles lie in middle draws that the halves lack: nothing can be said,
                # where ArviZ counts all draws as effective.
                assert value == 4 * (draws // 2) * 2
                continue
            assert ours == pytest.approx(value, rel=1e-8), name


@pytest.mark.parametrize("points", [1, 6, 7, 8, 13, 29])
def test_pieces_do_not_show(points, monkeypatch):
    x = make_draws("resting", 3, 14, points)
    whole = estimate(list(x))
    monkeypatch.setattr(convergence, "_PIECE", 3 * 14 * 7)  # seven points a piece
    monkeypatch.setattr(convergence, "_READ", 2)
    for name in ("mean", "sd", "rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd", "still"):
        ours = getattr(estimate(list(x)), name)  # a last bit may differ by the order of a sum
        np.testing.assert_allclose(ours, getattr(whole, name), rtol=1e-12, atol=1e-15)


def test_numbers_do_not_depend_on_the_scale():
    x = make_draws("slow", 4, 40)
    for scale in (1e-18, 1e6):  # weights after a collapse are as small as that
        found = estimate(list(scale * x))
        np.testing.assert_allclose(found.ess_bulk, estimate(list(x)).ess_bulk)
        np.testing.assert_allclose(found.mcse_mean, scale * estimate(list(x)).mcse_mean)


def test_what_never_moves_has_no_numbers_and_is_marked():
    x = make_draws("independent", 3, 20)
    x[..., 1] = 0.1  # the same in all chains; its variance in floating point is not zero
    x[..., 2] = np.array([0.1, 0.2, 0.3])[:, None]  # stuck in every chain elsewhere
    found = estimate(list(x))
    assert found.still.tolist() == [False, True, True, False]
    for name in ("rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd"):
        assert np.isnan(getattr(found, name)).tolist() == [False, True, True, False]
    np.testing.assert_allclose(found.mean[1:3], [0.1, 0.2])


def test_one_chain_has_ess_but_no_rhat():
    found = estimate(list(make_draws("slow", 1, 60)))
    assert np.isnan(found.rhat).all() and np.isfinite(found.ess_bulk).all()


def test_fewer_than_four_draws_have_a_mean_and_nothing_of_convergence():
    found = estimate(list(make_draws("independent", 2, 3)))
    assert np.isfinite(found.mean).all() and np.isfinite(found.sd).all()
    for name in ("rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd"):
        assert np.isnan(getattr(found, name)).all()
    assert np.isnan(estimate([np.ones((1, 2))]).sd).all()


def test_a_value_that_is_not_finite_is_in_no_number():
    x = make_draws("independent", 2, 10)
    clean = estimate(list(x))
    x[1, 4, 2], x[0, 0, 0] = np.inf, np.nan
    found = estimate(list(x))
    for name in ("mean", "rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd"):
        values = getattr(found, name)
        assert np.isnan(values[[0, 2]]).all()
        np.testing.assert_array_equal(values[[1, 3]], getattr(clean, name)[[1, 3]])


def test_ess_of_an_autoregressive_chain_is_the_known_one():
    # Of an AR(1) chain (1 - r) / (1 + r) of the draws are effective, r = 0.6: a quarter. The
    # median over 200 columns of estimates that scatter by some 10 % is good to 2 %.
    generator = np.random.default_rng(0)
    x = lfilter([1], [1, -0.6], generator.standard_normal((4, 1100, 200)), axis=1)[:, 100:]
    assert np.median(estimate(list(x)).ess_bulk) == pytest.approx(1000, rel=0.03)
