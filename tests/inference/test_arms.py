"""Numbers over seeds."""

import math

import numpy as np
import pytest

from inference.arms import Estimate


class TestEstimate:
    def test_interval_is_students(self):
        estimate = Estimate.of([1.0, 2.0, 3.0, 4.0, 10.0])
        assert (estimate.mean, estimate.median, estimate.count) == (4.0, 3.0, 5)
        half = 2.7764451 * np.std([1, 2, 3, 4, 10], ddof=1) / math.sqrt(5)  # t table, 4 degrees
        assert estimate.low == pytest.approx(4 - half) and estimate.high == pytest.approx(4 + half)

    def test_one_value_has_no_interval_and_nan_do_not_count(self):
        estimate = Estimate.of([0.5, math.nan])
        assert (estimate.mean, estimate.count, estimate.has_interval) == (0.5, 1, False)
        assert Estimate.of([]).count == 0

    def test_interval_of_a_share_stays_a_share(self):
        estimate = Estimate.of([0.9, 1.0], (0.0, 1.0))
        assert estimate.high == 1.0 and estimate.low < 0.9
