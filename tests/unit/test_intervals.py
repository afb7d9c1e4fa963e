from __future__ import annotations

import random

import pytest

from fusewise.profiles.intervals import median, median_interval, paired_interval


def test_the_interval_is_that_of_a_long_resampling() -> None:
    rng = random.Random(1)
    values = [rng.gauss(10, 2) for _ in range(21)]
    resampled = sorted(median(rng.choices(values, k=21)) for _ in range(20_000))
    exact = median_interval(values)
    ordered = sorted(values)
    for ours, theirs in ((exact.low, resampled[500]), (exact.high, resampled[-500])):
        assert abs(ordered.index(ours) - ordered.index(theirs)) <= 1


def test_one_value_has_an_interval_of_no_width() -> None:
    interval = median_interval([3.5])
    assert (interval.low, interval.median, interval.high) == (3.5, 3.5, 3.5)


@pytest.mark.parametrize("count", [2, 3, 5, 20, 21, 101])
def test_the_interval_holds_the_median_and_stays_inside(count: int) -> None:
    values = [float(v) for v in range(count)]
    interval = median_interval(values)
    assert values[0] <= interval.low <= interval.median <= interval.high <= values[-1]


def test_pairs_cancel_a_common_drift() -> None:
    drift = [float(i) for i in range(21)]
    interval = paired_interval([10 + d for d in drift], [9 + d for d in drift])
    assert (interval.low, interval.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match="zip"):
        paired_interval([1.0], [1.0, 2.0])


def test_the_median_is_an_observation() -> None:
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.0
