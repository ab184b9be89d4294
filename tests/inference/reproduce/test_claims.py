"""When our numbers agree with a sentence, disagree, or cannot tell, and that they are named."""

import pytest

from inference.reproduce.cases import Key
from inference.reproduce.claims import (
    Claim,
    Verdict,
    ahead,
    ahead_in_weight,
    all_of,
    flat,
    inverted,
    level,
    memory_ratio,
    right_way,
    score,
    time_ratio,
    together,
)
from inference.reproduce.results import Costs, Results
from inference.reproduce.settings import webnlg

BADS, BLO, CDS = (Key("mnist-25", name) for name in ("bads", "blo", "cds"))


@pytest.mark.parametrize(
    ("bads", "outcome", "numbers"),
    [
        ([0.90, 0.91, 0.92], "agrees", "bads − blo +10.0 [+7.5, +12.5]"),
        ([0.70, 0.71, 0.72], "disagrees", "bads − blo −10.0 [−12.5, −7.5]"),
        ([0.70, 0.81, 0.90], "cannot tell", "bads − blo −0.7 ["),
        ([0.90, 0.91], "cannot tell", "2 seeds of the 3 that it takes"),
        ([0.90], "cannot tell", "bads − blo +9.0, 1 seed of the 3 that it takes"),
        ([], "cannot tell", "bads − blo: no runs"),
    ],
)
def test_ahead_is_decided_by_the_interval_of_the_difference(bads, outcome, numbers, results):
    arms = {"blo": [0.81, 0.81, 0.81]} | ({"bads": bads} if bads else {})
    verdict = ahead(BADS, [BLO])(results(**arms))
    assert verdict.outcome == outcome
    assert numbers in verdict.numbers


def test_differences_are_paired_by_seed(results):
    verdict = ahead(BADS, [BLO])(results(bads=[0.5, 0.7, 0.9], blo=[0.48, 0.68, 0.88]))
    assert verdict == Verdict("agrees", "bads − blo +2.0 [+2.0, +2.0]")


def test_a_margin_has_two_ends(results):
    found = results(bads=[0.95, 0.96, 0.97], blo=[0.70, 0.71, 0.72])
    assert ahead(BADS, [BLO], 0.20, 0.30)(found).outcome == "agrees"
    assert ahead(BADS, [BLO], 0.10, 0.20)(found).outcome == "disagrees"


def test_a_method_without_runs_leaves_a_sentence_open_unless_another_part_refutes_it(results):
    good = results(bads=[0.90, 0.91, 0.92], blo=[0.8, 0.8, 0.8])
    bad = results(bads=[0.70, 0.71, 0.72], blo=[0.8, 0.8, 0.8])
    open_, refuted = (ahead(BADS, [BLO, CDS])(found) for found in (good, bad))
    assert open_.outcome == "cannot tell" and "bads − cds: no runs" in open_.numbers
    assert refuted.outcome == "disagrees"


def test_the_score_is_that_of_the_last_iterate(results):
    found = results(bads=[0.895, 0.896, 0.897])  # .905 and more where averaged over draws
    assert score(BADS, low=0.9)(found).outcome == "disagrees"
    assert score(BADS, high=0.9)(found).outcome == "agrees"


def test_scores_are_told_as_their_setting_has_them(results):
    found = results(bads=[0.25, 0.26, 0.27], blo=[0.2, 0.21, 0.22])
    setting = webnlg("controlled")
    found.settings[setting.name] = setting
    found.arms = {key._replace(setting=setting.name): arm for key, arm in found.arms.items()}
    bads, blo = found.arms
    assert score(bads, low=20.0)(found) == Verdict("agrees", "bads 26.0 [23.5, 28.5]")
    assert ahead(bads, [blo], 3.0, 7.0)(found) == Verdict("agrees", "bads − blo +5.0 [+5.0, +5.0]")
    assert ahead(bads, [blo], 0.03, 0.07)(found).outcome == "disagrees"


@pytest.mark.parametrize(
    ("high", "low", "right"),
    [(0.8, 0.2, "right"), (0.51, 0.49, "flat"), (0.2, 0.8, "inverted"), (0.55, 0.45, "")],
)
def test_weights_are_right_flat_or_inverted(high, low, right, results):
    around = [(0.9, high + shift, low) for shift in (-0.01, 0.0, 0.01)]
    found = results(bads=around)
    outcomes = {
        name: predicate(BADS)(found).outcome
        for name, predicate in (("right", right_way), ("flat", flat), ("inverted", inverted))
    }
    agreed = [name for name, outcome in outcomes.items() if outcome == "agrees"]
    assert agreed == ([right] if right else [])
    if right:
        assert [name for name, outcome in outcomes.items() if outcome == "disagrees"] == [
            name for name in outcomes if name != right
        ]


def test_a_level_takes_the_data_of_the_paper(results):
    found = results(blo=[0.5, 0.51, 0.52])
    low = score(BLO, high=0.6)
    assert level("mnist-25", low)(found).outcome == "agrees"
    verdict = level("cifar10-0.5", low)(found)
    assert verdict.outcome == "cannot tell" and "here blo 51.0 %" in verdict.numbers


def test_nothing_can_be_told_from_other_data(results):
    found = results(bads=[0.90, 0.91, 0.92], blo=[0.8, 0.8, 0.8])
    claim = Claim("BADS is ahead.", ahead(BADS, [BLO]))
    assert claim.judge(found).outcome == "agrees"
    found.stand_ins = {"digits"}
    assert claim.judge(found) == Verdict(
        "cannot tell", "measured on digits, not on the paper's data"
    )


def test_all_parts_have_to_agree_and_one_refutes():
    def of(*outcomes):
        return together(Verdict(outcome, outcome) for outcome in outcomes).outcome

    assert of("agrees", "agrees") == "agrees"
    assert of("agrees", "cannot tell") == "cannot tell"
    assert of("agrees", "cannot tell", "disagrees") == "disagrees"
    two = all_of(lambda _: Verdict("agrees", "one"), lambda _: Verdict("agrees", "two"))
    assert two(Results("small")).numbers == "one; two"


def costs(seconds, peaks):
    return Results("small", costs={"mnist-25": Costs(seconds, peaks, 100, {}, "cpu")})


def test_time_is_judged_by_the_ratios_of_all_rounds():
    found = costs({"plain": [1.0, 2.0, 1.0], "blo": [2.0, 4.2, 1.9], "bads": [1.0, 3.0, 2.0]}, {})
    assert time_ratio("mnist-25", "blo", 1.5, 2.5)(found) == Verdict(
        "agrees", "blo 2.00 (1.90 to 2.10)"
    )
    assert time_ratio("mnist-25", "blo", 0.8, 1.25)(found).outcome == "disagrees"
    assert time_ratio("mnist-25", "bads", 0.8, 1.25)(found).outcome == "cannot tell"
    assert time_ratio("mnist-25", "cds", 0.8, 1.25)(found).numbers == "cds: not measured"


def test_memory_is_judged_by_one_ratio():
    found = costs({}, {"plain": 100.0, "blo": 250.0, "cds": None})
    assert memory_ratio("mnist-25", "blo", 2.0, 3.0)(found) == Verdict("agrees", "blo 2.50")
    assert memory_ratio("mnist-25", "blo", 0.9, 1.1)(found).outcome == "disagrees"
    assert memory_ratio("mnist-25", "cds", 0.9, 1.1)(found).outcome == "cannot tell"


def test_a_source_is_ahead_in_weight_by_the_interval_of_the_difference(results):
    made = results(bads=[(0.9, 0.8, 0.2), (0.9, 0.7, 0.2), (0.9, 0.9, 0.2)])
    key = Key("mnist-25", "bads")
    verdict = ahead_in_weight(key, "rare", "frequent")(made)
    assert verdict == Verdict("agrees", "mean w of bads, rare − frequent 0.60 [0.35, 0.85]")
    assert ahead_in_weight(key, "frequent", "rare")(made).outcome == "disagrees"
    assert ahead_in_weight(key, "rare", "neither")(made).outcome == "cannot tell"
