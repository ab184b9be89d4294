from itertools import pairwise

import pytest

from bads_ppl.errors import InputError
from bads_ppl.schedules import Constant, Polynomial, Rescaled, Warmdown, as_schedule, by_group


def test_a_number_is_constant():
    schedule = as_schedule(0.1, "theta")
    assert schedule(0) == schedule(10**6) == 0.1


def test_warmdown_falls_along_half_a_cosine_and_then_stays():
    schedule = Warmdown(1.0, 0.1, 100)
    values = [schedule(step) for step in range(151)]
    assert values[0] == 1.0 and values[50] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1) and values[150] == values[100]
    assert all(a > b for a, b in pairwise(values[:101]))
    assert values[0] - values[10] < values[50] - values[60]  # slow at first


def test_polynomial_is_the_schedule_of_welling_and_teh():
    schedule = Polynomial(0.5, offset=10.0, power=0.55)
    assert schedule(0) == pytest.approx(0.5 * 10**-0.55)
    assert schedule(90) == pytest.approx(0.5 * 100**-0.55)


def test_a_rescaled_schedule_is_that_schedule_times_its_factor():
    schedule = Rescaled(Warmdown(1.0, 0.1, 100), lambda step: 1 / (1 + step))
    assert schedule(0) == 1.0 and schedule(50) == pytest.approx(0.55 / 51)


def test_one_step_size_serves_all_groups():
    found = by_group(0.3, {"theta": None, "w": None})
    assert {group: schedule(5) for group, schedule in found.items()} == {"theta": 0.3, "w": 0.3}


def test_each_group_has_its_own_and_companions_follow_their_network():
    shrinking = Polynomial(1.0)
    groups = {"theta": None, "auxiliary": "theta", "w": None}
    found = by_group({"theta": shrinking, "w": 0.2}, groups)
    assert found["theta"] is shrinking and found["auxiliary"] is shrinking
    assert found["w"] == Constant(0.2)
    apart = by_group({"theta": 0.1, "auxiliary": 0.4, "w": 0.2}, groups)
    assert apart["auxiliary"](0) == 0.4


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), lambda step: -0.5])
def test_steps_that_are_not_positive_numbers_are_refused(value):
    with pytest.raises(InputError, match="step_size of group 'w' must be a positive number"):
        as_schedule(value, "w")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"theta": 0.1}, "no entry for group 'w'"),
        ({"theta": 0.1, "w": 0.1, "phi": 0.1}, r"groups \['phi'\].*are \['theta', 'w'\]"),
    ],
)
def test_groups_and_steps_must_match(given, message):
    with pytest.raises(InputError, match=message):
        by_group(given, {"theta": None, "w": None})


@pytest.mark.parametrize(
    ("end", "steps", "message"),
    [(0.1, 0, "at least 1 step, got 0"), (0.0, 10, "end at a positive step size, got 0.0")],
)
def test_a_warmdown_that_cannot_be_walked_is_refused(end, steps, message):
    with pytest.raises(InputError, match=message):
        Warmdown(1.0, end, steps)
