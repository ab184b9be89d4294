"""Ranks, paired standard errors and what is said about them, against numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from inference.recommendation import SMALLEST, Recommendation, Scores, rank


def scores(losses: list[float], right: list[bool] | None = None) -> Scores:
    return Scores(np.array(losses), np.array(right if right else [True] * len(losses)))


def recommendation(failed: dict[str, str] | None = None, **candidates: Scores) -> Recommendation:
    failed = failed or {}
    options = {name: f"method={name}" for name in (*candidates, *failed)}
    return Recommendation(candidates, failed, options)


BETTER, WORSE = [1.0, 2.0, 3.0, 6.0], [1.5, 2.0, 4.0, 6.5]
"""Paired differences .5, 0, 1, .5: mean .5, variance (0 + .25 + .25 + 0) / 3."""


def test_scores_are_of_the_probability_of_the_label():
    probability = torch.tensor([[0.25, 0.75], [0.9, 0.1], [1.0, 0.0]])
    found = Scores.of(probability, torch.tensor([1, 1, 1]))
    assert found.log_loss[:2] == pytest.approx([-math.log(0.75), -math.log(0.1)])
    assert found.log_loss[2] == pytest.approx(-math.log(SMALLEST))  # not infinite
    assert found.right.tolist() == [True, False, False]


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
