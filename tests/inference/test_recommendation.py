"""Ranks, paired standard errors and what is said about them, against numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from inference.recommendation import SMALLEST, Recommendation, Scores, fitted_power, log_loss, rank


def scores(losses: list[float], right: list[bool] | None = None) -> Scores:
    found = np.array(losses)
    return Scores(found, 2 * found, np.array(right if right else [True] * len(losses)))


def recommendation(failed: dict[str, str] | None = None, **candidates: Scores) -> Recommendation:
    failed = failed or {}
    options = {name: f"method={name}" for name in (*candidates, *failed)}
    return Recommendation(candidates, failed, options)


BETTER, WORSE = [1.0, 2.0, 3.0, 6.0], [1.5, 2.0, 4.0, 6.5]
"""Paired differences .5, 0, 1, .5: mean .5, variance (0 + .25 + .25 + 0) / 3."""


HALVES = [torch.tensor([0, 2]), torch.tensor([1, 3])]


def test_scores_are_of_the_probability_of_the_label():
    probability = torch.tensor([[0.25, 0.75], [0.9, 0.1], [1.0, 0.0], [0.5, 0.5]])
    found = Scores.of(probability, torch.tensor([1, 1, 1, 0]), HALVES)
    wanted = [-math.log(0.75), -math.log(0.1), -math.log(SMALLEST), math.log(2)]  # not infinite
    assert found.unscaled == pytest.approx(wanted, abs=1e-6)
    assert found.right.tolist() == [True, False, False, True]


def test_probabilities_are_rescaled_by_what_the_other_fold_says():
    probability = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.8, 0.2], [0.1, 0.9]])
    target = torch.tensor([0, 1, 1, 0])
    found = Scores.of(probability, target, HALVES).log_loss
    log_p = probability.double().log().numpy()
    power = fitted_power(log_p[[1, 3]], target[[1, 3]].numpy())
    assert found[[0, 2]] == pytest.approx(log_loss(power * log_p[[0, 2]], target[[0, 2]].numpy()))
    own_changed = Scores.of(probability, torch.tensor([0, 1, 0, 0]), HALVES).log_loss
    assert own_changed[0] == found[0] and own_changed[1] != found[1]


def test_the_power_is_that_at_which_probabilities_come_true():
    log_p = np.log(np.tile([0.6, 0.4], (5000, 1)))
    often = (np.arange(5000) % 10 == 0).astype(np.int64)  # nine of ten are of the first class
    assert fitted_power(log_p, often) == pytest.approx(math.log(9) / math.log(1.5), rel=0.01)


def test_a_few_points_that_are_all_right_do_not_ask_for_certainty():
    log_p = np.log(np.tile([0.9, 0.1], (5, 1)))
    assert 1 < fitted_power(log_p, np.zeros(5, dtype=np.int64)) < 3


def test_a_method_that_is_only_less_sure_is_not_told_apart():
    draw = torch.Generator().manual_seed(0)
    sure = (3 * torch.randn(200, 4, generator=draw)).softmax(dim=1)
    target = torch.multinomial(sure, 1, generator=draw)[:, 0]
    folds = list(torch.arange(200).split(100))
    cautious = Scores.of((0.3 * sure.log()).softmax(dim=1), target, folds)
    first, other = rank({"sure": Scores.of(sure, target, folds), "cautious": cautious})
    assert other.difference < 0.01 and abs(other.unscaled - first.unscaled) > 0.2


def test_the_standard_error_is_that_of_the_paired_differences():
    best, other = rank({"worse": scores(WORSE), "better": scores(BETTER)})
    assert (best.name, best.log_loss, best.difference, best.error) == ("better", 3.0, 0.0, 0.0)
    assert other.difference == pytest.approx(0.5)
    assert other.error == pytest.approx(math.sqrt(0.5 / 3) / 2)
    half = 3.182446305284263 * math.sqrt(0.5 / 3) / 2  # 97.5 % quantile of t with 3 degrees
    assert (other.low, other.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_one_standard_error_is_what_tells_candidates_apart():
    best, close, far = rank(
        {"far": scores(WORSE), "best": scores(BETTER), "close": scores([2.0, 2.0, 3.0, 5.5])}
    )
    assert [one.name for one in (best, close, far)] == ["best", "close", "far"]
    assert close.difference == pytest.approx(0.125) and close.error == pytest.approx(
        0.3146, abs=1e-4
    )
    assert close.near and not far.near and best.near


def test_of_equals_the_first_is_recommended():
    found = recommendation(b=scores(BETTER), a=scores(BETTER))
    assert found.best == "b" and found.ranks[1].near


def test_the_sentence_names_the_best_and_those_not_told_from_it():
    close = scores([2.0, 2.0, 3.0, 5.5])
    some = recommendation(best=scores(BETTER), close=close, far=scores(WORSE)).sentence
    assert some.startswith("Recommended: best, ") and "by 4 points: close)" in some
    assert "not told apart" not in recommendation(best=scores(BETTER), far=scores(WORSE)).sentence


def test_the_limits_count_points_that_only_one_of_two_gets_right():
    first = scores(BETTER, [True, True, True, False])
    second = scores(WORSE, [False, False, True, True])
    text = recommendation(a=first, b=second).limits
    assert "one point is 25 % of accuracy" in text
    assert "only the first is right on 2 points, only the second on 1" in text
    assert recommendation(a=first).limits == ""


def test_failures_are_in_the_table_with_their_message():
    found = recommendation({"wild": "it diverged"}, good=scores(BETTER))
    assert "wild  " in found.table() and "failed: it diverged" in found.table()
    frame = found.to_frame().set_index("candidate")
    assert list(frame.index) == ["good", "wild"] and frame.failed["wild"] == "it diverged"
    assert frame.log_loss["good"] == 3.0 and frame.overrides["wild"] == "method=wild"


def test_where_all_fail_nothing_is_recommended():
    found = recommendation({"wild": "it diverged"})
    assert found.best is None and found.limits == "" and "every candidate failed" in found.sentence


def test_the_figure_has_every_candidate_with_its_interval():
    ranks = recommendation(a=scores(BETTER), b=scores(WORSE)).ranks
    axes = recommendation(a=scores(BETTER), b=scores(WORSE)).figure().axes[0]
    assert [label.get_text().split("\n")[0] for label in axes.get_yticklabels()] == ["a", "b"]
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars[1] == pytest.approx([3.0 + ranks[1].low, 3.0 + ranks[1].high])
