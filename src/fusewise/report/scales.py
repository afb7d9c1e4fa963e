"""The scales that all panels of one picture share, and their ticks. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusewise.profiles.intervals import median, median_interval
from fusewise.profiles.schema import Sample
from fusewise.shape import Shape

RATIO_TOP = 2.0  # a path this much slower than the best is out of the race
_FOOT = 0.2  # share of the time axis kept free for the crossovers' sizes
_SIZE_TICKS = 8
_LINEAR_TICKS = 5


class Points:
    """The points of one hidden size as plain lists, ascending in size."""

    def __init__(self, rows: Mapping[Shape, Mapping[str, Sample]], order: Sequence[str]) -> None:
        self.sizes = [shape.message_bytes for shape in rows]
        self.spans = [
            {name: median_interval(sample.times_us) for name, sample in row.items()}
            for row in rows.values()
        ]
        self.best = [min(span.median for span in row.values()) for row in self.spans]
        names = dict.fromkeys(name for row in self.spans for name in row)
        self.names = [name for name in order if name in names]

    def ratios(self) -> list[list[float]]:
        """Every path's time over the fastest one's, ascending, size by size; the first is 1."""
        return [
            sorted(span.median / best for span in row.values())
            for row, best in zip(self.spans, self.best, strict=True)
        ]


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high``, by their logarithm or as they are, with marked ``ticks``."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends: 0 at ``low``, 1 at ``high``."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Scales:
    """Equal in all panels: message size in bytes, time in µs, time over the fastest one's."""

    size: Axis
    time_us: Axis
    ratio: Axis


def scales(columns: Sequence[Points]) -> Scales:
    """What shows all points of all panels, with room for words under the lowest line."""
    sizes = [size for column in columns for size in column.sizes]
    size = Axis(min(sizes) / 1.25, max(sizes) * 1.25, tuple(_binary(sizes)), True)
    times = [s.median for column in columns for row in column.spans for s in row.values()]
    decades = max(math.log10(max(times) / min(times)), 0.3)
    low, high = min(times) * 10 ** (-_FOOT * decades), max(times) * 10 ** (0.05 * decades)
    top = ratio_top([column.ratios() for column in columns])
    return Scales(
        size,
        Axis(low, high, tuple(_decimal(low, high)), True),
        Axis(1 - 0.04 * (top - 1), top, tuple(even_ticks(1.0, top))),
    )


def ratio_top(ratios: Sequence[Sequence[Sequence[float]]]) -> float:
    """At most ``RATIO_TOP``, unless the runners-up are mostly slower than that everywhere."""
    slowest = max(row[-1] for rows in ratios for row in rows)
    runners_up = min(median([row[min(1, len(row) - 1)] for row in rows]) for rows in ratios)
    return min(max(RATIO_TOP, 1.2 * runners_up), max(1.1, 1 + 1.15 * (slowest - 1)))


def _binary(sizes: Sequence[int]) -> list[float]:
    """Powers of two among the sizes, at most ``_SIZE_TICKS``; the smallest size where none is."""
    powers = range(math.ceil(math.log2(min(sizes))), math.floor(math.log2(max(sizes))) + 1)
    step = math.ceil(len(powers) / _SIZE_TICKS) or 1
    return [2.0**power for power in powers[::step]] or [float(min(sizes))]


def _decimal(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade; even steps where that gives fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return found if len(found) > 2 else even_ticks(low, high)


def even_ticks(low: float, high: float) -> list[float]:
    """Round values between the ends, at most six."""
    raw = (high - low) / _LINEAR_TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= raw - 1e-12)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
