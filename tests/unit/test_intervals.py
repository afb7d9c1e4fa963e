"""The interval of a median: exact, monotonic, the same everywhere."""

from __future__ import annotations

import random

import pytest

from fusewise.profiles.intervals import median, median_interval, paired_interval, ratio_interval


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


def test_the_interval_of_a_ratio_is_that_of_a_long_resampling() -> None:
    rng = random.Random(2)
    before = [rng.gauss(10, 1) for _ in range(21)]
    after = [rng.gauss(12, 1) for _ in range(31)]
    resampled = sorted(
        median(rng.choices(after, k=31)) / median(rng.choices(before, k=21)) for _ in range(20_000)
    )
    exact = ratio_interval(before, after)
    assert exact.median == median(after) / median(before)
    assert abs(exact.low - resampled[500]) < 0.01
    assert abs(exact.high - resampled[-500]) < 0.01
    assert exact.low < exact.median < exact.high


def test_the_ratio_of_two_runs_knows_no_pairs_and_no_order() -> None:
    before, after = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 1.0, 5.0, 2.0, 4.0]
    assert ratio_interval(before, after) == ratio_interval(sorted(before), sorted(after))
    same = ratio_interval([7.0] * 21, [7.0] * 9)
    assert (same.low, same.median, same.high) == (1.0, 1.0, 1.0)
    one = ratio_interval([2.0], [3.0])
    assert (one.low, one.median, one.high) == (1.5, 1.5, 1.5)
    wide = ratio_interval([float(v) for v in range(1, 1002)], [500.0])
    assert 0.9 < wide.low < wide.median < wide.high < 1.1
