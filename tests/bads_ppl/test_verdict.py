"""The verdict names the weakest fact, and the advice is worth following."""

import re

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from bads_ppl.diagnostics import diagnose
from bads_ppl.draws import ChainDraws
from bads_ppl.verdict import Facts, collapsed

GOOD = {
    "chains": 4,
    "draws": 200,
    "points": 1000,
    "rhat_max": 1.03,
    "rhat_99pct": 1.02,
    "agreeing": 1.0,
    "ess_bulk_min": 300.0,
    "ess_bulk_median": 600.0,
    "ess_tail_min": 200.0,
    "potential_rhat": 1.01,
    "total": 50.0,
    "target": 0.05,
    "steps": 4000,
    "thinning": 10,
}
BAD = {"rhat_max": 2.0, "rhat_99pct": 1.3, "agreeing": 0.4, "ess_bulk_median": 30.0}
ALONE = {"chains": 1, "rhat_max": None, "rhat_99pct": None, "agreeing": None}


def facts(evidence="calibrated", **changes):
    return Facts(evidence=evidence, **{**GOOD, "potential_rhat": None, **changes})


@pytest.mark.parametrize(
    ("evidence", "changes", "verdict"),
    [
        ("calibrated", {}, "converged"),
        ("approximate", {}, "approximate"),
        ("calibrated", BAD, "not converged"),
        ("approximate", BAD, "not converged"),
        ("calibrated", {"rhat_99pct": 1.0501}, "not converged"),
        ("calibrated", {"rhat_99pct": 1.05, "rhat_max": 1.5}, "converged"),
        ("calibrated", {"ess_bulk_median": 399.0}, "not converged"),
        ("calibrated", {"ess_bulk_median": 399.0, "chains": 3}, "converged"),
        ("calibrated", {"potential_rhat": 1.2}, "not converged"),
        ("approximate", ALONE, "unknown"),
        ("calibrated", {"draws": 3}, "unknown"),
        ("calibrated", {**ALONE, "end": "low", "total": 1e-3}, "collapsed"),
        ("approximate", {"end": "high", "total": 999.9}, "collapsed"),
        ("optimisation path", {}, "optimisation path"),
        ("optimisation path", BAD, "optimisation path"),
        ("optimisation path", {"end": "low", "total": 1e-3}, "optimisation path"),
        ("fixed", ALONE, "fixed"),
    ],
)
def test_verdict_is_the_weakest_fact(evidence, changes, verdict):
    assert facts(evidence, **changes).verdict == verdict


@pytest.mark.parametrize("changes", [{}, BAD, ALONE, {"draws": 3}])
def test_approximate_draws_are_called_so_whatever_the_chains_do(changes):
    assert "approximate" in facts("approximate", **changes).sentence
    assert "approximate" not in facts("calibrated", **changes).sentence


@pytest.mark.parametrize("changes", [{}, BAD, ALONE, {"end": "low", "total": 1e-3}])
def test_an_optimisation_path_is_never_called_a_posterior(changes):
    sentence = facts("optimisation path", **changes).sentence
    assert "optimisation path and no posterior" in sentence
    assert "posterior draws, up to" not in sentence and "approximate" not in sentence


def test_only_converged_calibrated_draws_may_be_called_posterior_draws():
    claim = "may be called posterior draws"
    assert claim in facts().sentence
    for evidence, changes in (("approximate", {}), ("calibrated", BAD), ("calibrated", ALONE)):
        assert claim not in facts(evidence, **changes).sentence


def test_the_sentence_says_whether_chains_agree_in_numbers():
    sentence = facts(**BAD).sentence
    assert "for 40 % of the weights (99 % are asked for)" in sentence
    assert "30 effective draws of 800 (400 are asked for)" in sentence
    assert "98.9 %" in facts(agreeing=0.98999).sentence  # never rounded up to what is asked


def test_the_advice_is_as_many_steps_as_the_worse_of_rhat_and_ess_needs():
    # R-hat: (1.12^2 - 1) / (1.05^2 - 1) = 2.48; ESS: 400 / 250 = 1.6; potential: 3.15; times 1.1
    one = facts(rhat_99pct=1.12, agreeing=0.9, ess_bulk_median=250.0)
    assert "Run about 2.8 times as many steps: steps=11000" in one.sentence
    two = facts(ess_bulk_median=250.0)
    assert "Run about 1.8 times as many steps: steps=7100" in two.sentence
    assert "agree so far" in two.sentence
    three = facts(potential_rhat=1.15)
    assert "Run about 3.5 times as many steps" in three.sentence
    assert "potential's R-hat is 1.15" in three.sentence
    assert "steps=" not in facts(ess_bulk_median=250.0, steps=None).sentence


def test_chains_that_mix_too_slowly_are_not_told_to_run_for_ever():
    sentence = facts(rhat_99pct=2.0, agreeing=0.0, ess_bulk_median=8.0).sentence
    assert "at least 55 times as many steps" in sentence and "larger steps" in sentence
    assert "steps=" not in sentence


def test_thinning_less_is_advised_only_where_it_gives_enough_draws():
    independent = facts(draws=75, ess_bulk_median=300.0)
    assert "thin less: thinning=7" in independent.sentence
    # Half of the draws effective: those in between would tell hardly more.
    assert "thin less" not in facts(draws=100, ess_bulk_median=200.0).sentence
    assert "thin less" not in facts(draws=75, ess_bulk_median=300.0, thinning=1).sentence
    assert "thin less" not in facts(rhat_99pct=1.1, agreeing=0.9, ess_bulk_median=300.0).sentence


@pytest.mark.parametrize("memory", [0.8, 0.9])
def test_chains_agree_once_the_advice_is_followed(memory):
    def chains(draws):
        found = []
        for seed in range(4):
            noise = np.random.default_rng(seed).standard_normal((draws + 100, 400))
            w = lfilter([1], [1, -memory], noise, axis=0)[100:]
            step = 10.0 * np.arange(1, draws + 1)
            found.append(ChainDraws((0.5 + 0.01 * w).astype(np.float32), {"step": step}))
        return diagnose(found, evidence="calibrated", target=0.5)

    short = chains(250)
    assert short.verdict == "not converged"
    steps = int(re.search(r"steps=(\d+)", short.sentence)[1])
    assert steps < 10 * 2500
    assert chains(steps // 10).agree


@pytest.mark.parametrize(
    ("total", "said"), [(24.0, "below half"), (26.0, None), (99.0, None), (101.0, "above twice")]
)
def test_a_total_far_from_the_target_is_said(total, said):
    sentence = facts(total=total).sentence
    assert (said or "The weights sum to") in sentence if said else "sum to" not in sentence
    assert "sum to" not in facts(total=total, target=None).sentence


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_collapse_is_all_weights_at_one_end(make):
    assert collapsed(make([4e-4, 1e-9]), 0.05) == "low"
    assert collapsed(make([6e-4, 1e-9]), 0.05) is None  # above a hundredth of beta
    assert collapsed(make([1.0, 0.9999]), 0.05) == "high"
    assert collapsed(make([1.0, 0.98]), 0.05) is None
    assert collapsed(make([1e-9, 1e-9, 1.0]), 0.05) is None  # a point was found
    assert collapsed(make([0.996, 0.997]), 0.9) is None  # nearly all are wanted
    assert collapsed(make([1e-9]), None) is None
    assert collapsed(make([]), 0.5) is None


def test_collapse_says_what_to_change():
    sentence = facts(end="low", total=1e-3).sentence
    assert "close to 0" in sentence and "smaller steps" in sentence and "prior" in sentence
    assert "close to 1" in facts(end="high", total=999.0).sentence
