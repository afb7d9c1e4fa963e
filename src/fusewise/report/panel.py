"""One panel of the picture: every path's lines, the strip of decisions, the marks of change.

Upper part: median time of every path over message size, with its interval. Lower part: the same
divided by the fastest path's time, where a lead of a few percent can be seen. The strip between
them shows which path the plan runs, over the sizes that were measured and no others. Decides
nothing: what runs where comes from the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from fusewise.operation import all_reduce_of, is_unfused, variant_of
from fusewise.profiles.bands import Band, Table
from fusewise.profiles.intervals import Interval
from fusewise.report.colors import color_of, marker, on
from fusewise.report.crossings import rounded_size
from fusewise.report.drawing import Area, Item, Line, Place, Words, rectangle, width_of
from fusewise.report.scales import Axis, Points, Scales
from fusewise.shape import format_size

T = TypeVar("T")

HEIGHT = 436.0
_LEFT, _RIGHT = 46.0, 8.0  # room for the times' ticks; for half a tick's words
_UPPER = (38.0, 238.0)
_STRIP = (268.0, 286.0)
_LOWER = (308.0, 400.0)
_MARKER = 3.0  # half its width, px
_SMALL = 10.0
_OUTLINES: dict[str, tuple[Place, ...]] = {
    "o": tuple((x, y) for x, y in (
        (1, 0), (0.87, 0.5), (0.5, 0.87), (0, 1), (-0.5, 0.87), (-0.87, 0.5), (-1, 0),
        (-0.87, -0.5), (-0.5, -0.87), (0, -1), (0.5, -0.87), (0.87, -0.5),
    )),
    "s": rectangle(-0.9, -0.9, 0.9, 0.9),
    "D": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    "^": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
    "v": ((0, 1.2), (1.1, -0.9), (-1.1, -0.9)),
    "P": (
        (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
        (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
    ),
    "X": (
        (-1.2, -0.7), (-0.7, -1.2), (0, -0.5), (0.7, -1.2), (1.2, -0.7), (0.5, 0),
        (1.2, 0.7), (0.7, 1.2), (0, 0.5), (-0.7, 1.2), (-1.2, 0.7), (-0.5, 0),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """One of the two parts: its place on the sheet and its scales."""

    left: float
    right: float
    top: float
    bottom: float
    across: Axis
    up: Axis

    def x(self, size: float) -> float:
        """Where a message size is, px."""
        return self.left + self.across.share(size) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Where a time or ratio is, px; above ``top`` where it is too large for the part."""
        return self.bottom - self.up.share(value) * (self.bottom - self.top)

    def clamped(self, value: float) -> float:
        """As ``y``, but never outside the part."""
        return min(max(self.y(value), self.top), self.bottom)


def panel(
    column: Points, table: Table | None, scale: Scales, hidden_size: int, width: float
) -> list[Item]:
    """The panel's items, ``width`` by ``HEIGHT`` px.

    Args:
        column: the points of one hidden size.
        table: the plan's bands there; None: nothing was decided.
        scale: of ``scales.scales``.
        hidden_size: for the title.
        width: px.
    """
    ends = _LEFT, width - _RIGHT
    upper = Frame(*ends, *_UPPER, scale.size, scale.time_us)
    lower = Frame(*ends, *_LOWER, scale.size, scale.ratio)
    items: list[Item] = [Words((0, 12), f"hidden {hidden_size}", size=13, bold=True)]
    for frame, title in ((upper, "time per call, µs"), (lower, "time ÷ fastest")):
        items += _grid(frame, title)
    items += _size_axis(lower)
    if table is not None:
        items += _changes(upper, lower, table, column)
    runs = [table.band_at(size).path if table else "" for size in column.sizes]
    for name in column.names:
        ones = [1.0] * len(column.sizes)
        items += _path(upper, column, name, ones, runs)
        items += _path(lower, column, name, column.best, runs)
    if table is not None:
        items += _strip(upper, table)
    return items


def _grid(frame: Frame, title: str) -> Iterator[Item]:
    yield Words((frame.left, frame.top - 7), title, "soft", _SMALL)
    for tick in frame.up.ticks:
        y = frame.y(tick)
        yield Line(((frame.left, y), (frame.right, y)), "line")
        yield Words((frame.left - 6, y + 3.5), f"{tick:.6g}", "soft", _SMALL, "end")
    yield Line(((frame.left, frame.top), (frame.left, frame.bottom)), "soft", 0.8)


def _size_axis(frame: Frame) -> Iterator[Item]:
    yield Line(((frame.left, frame.bottom), (frame.right, frame.bottom)), "soft", 0.8)
    for tick in frame.across.ticks:
        x = frame.x(tick)
        yield Line(((x, frame.bottom), (x, frame.bottom + 3)), "soft", 0.8)
        place = (x, frame.bottom + 15)
        yield Words(place, format_size(int(tick)), "soft", _SMALL, "middle")
    middle = (frame.left + frame.right) / 2
    yield Words((middle, frame.bottom + 31), "message size", "soft", _SMALL, "middle")


def _path(
    frame: Frame, column: Points, name: str, units: Sequence[float], runs: Sequence[str]
) -> Iterator[Item]:
    """A path's medians with their interval; a broad shade where the plan runs the path."""
    color = color_of(name)
    for piece in _pieces([row.get(name) for row in column.spans], units):
        places = [(frame.x(column.sizes[i]), span) for i, span in piece]
        line = [(x, frame.y(span.median)) for x, span in places]
        if any(span.low < span.high for _, span in places):
            high = [(x, frame.clamped(span.high)) for x, span in places]
            low = [(x, frame.clamped(span.low)) for x, span in places]
            yield Area((*high, *reversed(low)), color, 0.22)
        for part in _below(line, frame.top):
            yield Line(tuple(part), color, 1.4, dashes(name))
        shaded = [
            at if runs[i] == name and at[1] >= frame.top else None
            for (i, _), at in zip(piece, line, strict=True)
        ]
        for run in _unbroken(shaded):
            yield Line(tuple(run if len(run) > 1 else run * 2), color, 7, (), 0.3)
        yield from (dot(at, name) for at in line if at[1] >= frame.top)


def _below(line: Sequence[Place], top: float) -> list[list[Place]]:
    """The parts of a line under the edge ``top``, cut where it crosses it."""
    parts: list[list[Place]] = [[]]
    for before, after in pairwise(line):
        (x, y), (u, v) = before, after
        if y >= top:
            parts[-1].append(before)
        if (y < top) != (v < top):
            parts[-1].append((x + (u - x) * (top - y) / (v - y), top))
            if v < top:
                parts.append([])
    if line[-1][1] >= top:
        parts[-1].append(line[-1])
    return [part for part in parts if len(part) > 1]


def _pieces(
    spans: Sequence[Interval | None], units: Sequence[float]
) -> Iterator[list[tuple[int, Interval]]]:
    """Neighbouring sizes at which the path was measured, in the given units."""
    known = [
        None if s is None else (i, Interval(s.median / unit, s.low / unit, s.high / unit))
        for i, (s, unit) in enumerate(zip(spans, units, strict=True))
    ]
    yield from _unbroken(known)


def _unbroken(values: Sequence[T | None]) -> Iterator[list[T]]:
    run: list[T] = []
    for value in values:
        if value is not None:
            run.append(value)
        elif run:
            yield run
            run = []
    if run:
        yield run


def dashes(path: str) -> tuple[float, ...]:
    """Fused paths are solid, unfused dashed, variants of a kernel dotted."""
    if is_unfused(path):
        return (5, 3)
    return (1.5, 3) if variant_of(path) else ()


def dot(place: Place, path: str, half: float = _MARKER) -> Area:
    """The path's marker."""
    outline = _OUTLINES[marker(path)]
    corners = tuple((place[0] + half * x, place[1] + half * y) for x, y in outline)
    return Area(corners, color_of(path))


def _strip(frame: Frame, table: Table) -> Iterator[Item]:
    """A bar in the colours of the paths that the plan runs, each named, where sizes were measured.

    A name that does not fit into its piece stands above it, in one of two lines.
    """
    taken = [frame.left, frame.left]
    for band, first, last in _measured_bands(table):
        left, right = frame.x(first), frame.x(last)
        if right - left < 3:  # one measured size: as wide as its marker
            left, right = left - 3, right + 3
        color = color_of(band.path)
        yield Area(rectangle(left, _STRIP[0], right, _STRIP[1]), color)
        names = (band.path, all_reduce_of(band.path))
        inside = [name for name in names if width_of(name, _SMALL) < right - left - 6]
        middle = (left + right) / 2
        if inside:
            place = (middle, _STRIP[1] - 5.5)
            yield Words(place, inside[0], on(color), _SMALL, "middle")
            continue
        wide = width_of(names[1], _SMALL)
        start = min(max(middle - wide / 2, frame.left), frame.right - wide)
        free = [line for line, used in enumerate(taken) if used <= start]
        if free:
            taken[free[0]] = start + wide + 6
            yield Words((start, _STRIP[0] - 4 - 12 * free[0]), names[1], "ink", _SMALL)


def _measured_bands(table: Table) -> Iterator[tuple[Band, int, int]]:
    """Every band that reaches into what was measured, with the part that does."""
    for band in table.bands:
        end = table.validated_to + 1 if band.end_bytes is None else band.end_bytes
        if end > table.validated_from and band.min_bytes <= table.validated_to:
            first = max(band.min_bytes, table.validated_from)
            yield band, first, min(end, table.validated_to)


def _changes(upper: Frame, lower: Frame, table: Table, column: Points) -> Iterator[Item]:
    """A dotted line where the plan changes path, its size at the foot of the upper part.

    Shaded: from the last measured size before it to the first one at or above it.
    """
    edges = [
        band.min_bytes
        for before, band in pairwise(table.bands)
        if band.path != before.path and band.min_bytes <= column.sizes[-1]
    ]
    word = "crossover " if len(edges) == 1 else ""
    taken = [upper.left, upper.left]
    for edge in edges:
        above = max((size for size in column.sizes if size < edge), default=edge)
        below = min(size for size in column.sizes if size >= edge)
        x = upper.x(edge)
        for frame in (upper, lower):
            sides = frame.x(above), frame.top, frame.x(below), frame.bottom
            yield Area(rectangle(*sides), "ink", 0.06)
            yield Line(((x, frame.top), (x, frame.bottom)), "ink", 1, (1, 2.5))
        label = word + rounded_size(edge)
        wide = width_of(label, 11) + 6
        flipped = x + wide > upper.right
        start = x - wide if flipped else x
        free = [line for line, used in enumerate(taken) if used <= start]
        if not free:  # three changes within a tenth of the axis: the line alone must do
            continue
        taken[free[0]] = start + wide
        place = (x - 4 if flipped else x + 4, upper.bottom - 6 - 14 * free[0])
        yield Words(place, label, "ink", 11, "end" if flipped else "start", bold=True)
