"""Medians and confidence intervals of paired timings. Pure, deterministic, no numpy.

The bootstrap distribution of a sample median needs no resampling: a resample's median is one of
the observations, and it is at most the k-th smallest exactly when at least half of the resample
falls on the k smallest, a binomial event (Efron, "The Jackknife, the Bootstrap and Other
Resampling Plans", 1982, section 10.3). So the interval below is the one a bootstrap with
infinitely many resamples would give, and the same profile always yields the same plan.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_NEGLIGIBLE = 1e-9  # of all probability: a thousand such values move no interval


@dataclass(frozen=True)
class Interval:
    """A median with its percentile interval, all in the unit of the observations."""

    median: float
    low: float
    high: float


def median(values: Sequence[float]) -> float:
    """The lower median: always one of the observations."""
    return sorted(values)[(len(values) - 1) // 2]


def median_interval(values: Sequence[float]) -> Interval:
    """The exact bootstrap percentile interval of the median of ``values``.

    One value gives an interval of zero width: a published number that came without its spread.
    """
    ordered = sorted(values)
    low, high = _ranks(len(ordered))
    return Interval(ordered[(len(ordered) - 1) // 2], ordered[low], ordered[high])


def paired_interval(slower: Sequence[float], faster: Sequence[float]) -> Interval:
    """The interval of ``slower[i] - faster[i]``: pairs come from the same interleaved round."""
    return median_interval([a - b for a, b in zip(slower, faster, strict=True)])


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The exact bootstrap interval of median(after) / median(before), for two separate runs.

    Rounds of two runs are not paired: each median has its own bootstrap distribution, and the
    ratio's is that of their product space. Values are above zero.
    """
    ratios = sorted(
        (theirs / ours, p * q) for ours, p in _bootstrap(before) for theirs, q in _bootstrap(after)
    )
    reached = list(itertools.accumulate(p for _, p in ratios))
    tail = (1 - CONFIDENCE) / 2 * reached[-1]
    low = bisect.bisect_right(reached, tail)
    high = bisect.bisect_left(reached, reached[-1] - tail - 1e-12)
    return Interval(median(after) / median(before), ratios[low][0], ratios[high][0])


def _bootstrap(values: Sequence[float]) -> list[tuple[float, float]]:
    """The values that a resample's median takes, with their probabilities; tiny ones left out."""
    pairs = zip(sorted(values), _weights(len(values)), strict=True)
    return [(value, p) for value, p in pairs if p > _NEGLIGIBLE]


@functools.lru_cache(maxsize=64)
def _weights(count: int) -> list[float]:
    at_most = [_median_at_most(count, k) for k in range(count + 1)]
    return [high - low for low, high in itertools.pairwise(at_most)]


@functools.lru_cache(maxsize=64)
def _ranks(count: int) -> tuple[int, int]:
    """Indices of the order statistics at the two tails of the bootstrap distribution."""
    tail = (1 - CONFIDENCE) / 2
    at_most = [_median_at_most(count, k) for k in range(1, count + 1)]
    low = next(i for i, p in enumerate(at_most) if p > tail)
    high = next(i for i, p in enumerate(at_most) if p >= 1 - tail - 1e-12)
    return low, high


def _median_at_most(count: int, k: int) -> float:
    """P(lower median of a resample ≤ k-th smallest observation)."""
    needed, p = (count + 1) // 2, k / count
    ways = _ways(count)
    return math.fsum(
        ways[hits] * p**hits * (1 - p) ** (count - hits) for hits in range(needed, count + 1)
    )


@functools.lru_cache(maxsize=64)
def _ways(count: int) -> list[int]:
    """Binomial coefficients: wide numbers, and the same ones for every k."""
    return [math.comb(count, hits) for hits in range(count + 1)]
