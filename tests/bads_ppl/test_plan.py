"""Which steps make draws, keep networks and evaluate."""

import pytest

from bads_ppl.errors import InputError
from bads_ppl.plan import Plan


def test_draws_come_after_burn_in_every_thinning_steps():
    plan = Plan(100, burn_in=40, thinning=25)
    assert plan.draw_steps(lambda step: True) == [65, 90] and plan.draws == 2


def test_half_of_the_steps_are_burn_in_unless_given():
    assert Plan(101).first == 50 and Plan(101, burn_in=0).first == 0


def test_a_sampler_may_leave_draws_out():
    plan = Plan(40, burn_in=0, thinning=10)
    assert plan.draw_steps(lambda step: step % 20 == 0) == [20, 40]
    with pytest.raises(InputError, match="allows no draw from step 0 to 40"):
        plan.draw_steps(lambda step: False)


@pytest.mark.parametrize(
    ("snapshots", "draws", "kept"),
    [(2, 10, {5, 10}), (3, 2, {1, 2}), (0, 10, set()), (1, 7, {7}), (3, 10, {3, 6, 10})],
)
def test_snapshots_are_spread_over_the_draws_and_end_with_the_last(snapshots, draws, kept):
    assert Plan(1000, snapshots=snapshots).snapshot_draws(draws) == kept


def test_evaluations_are_ten_unless_given():
    assert Plan(1500).evaluation_steps == 150 and Plan(5, thinning=1).evaluation_steps == 1
    assert Plan(1500, evaluate_every=7).evaluation_steps == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 100, "thinning": 0}, "thinning must be at least 1"),
        ({"steps": 100, "burn_in": 100}, r"burn_in must be from 0 to steps - 1 = 99, got 100"),
        ({"steps": 100, "burn_in": -1}, "got -1"),
        ({"steps": 100, "thinning": 51}, "thinning must be at most steps - burn_in = 50, got 51"),
        ({"steps": 100, "snapshots": -1}, "snapshots must be 0 or more"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Plan(**options)
