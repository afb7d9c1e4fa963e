"""One panel of the picture: its scales, lines, strip of decisions and marks of change.

Draws on axes it is given; ``plot.py`` makes the figure and the file. Decides nothing: what runs
where comes from the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fusewise.operation import all_reduce_of, is_unfused
from fusewise.profiles.bands import Table
from fusewise.profiles.intervals import Interval, median, median_interval
from fusewise.profiles.schema import Sample
from fusewise.report.crossings import rounded_size
from fusewise.shape import Shape, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's "muted" scheme, made for colour-blind readers (personal.sron.nl/~pault), and a grey.
# A backend keeps its colour and marker in every picture; fused paths are solid, unfused dashed.
STYLES: Mapping[str, tuple[str, str]] = {
    "native.one_shot": ("#332288", "o"),
    "native.two_shot": ("#88CCEE", "s"),
    "shm.one_shot": ("#332288", "o"),
    "flashinfer.one_shot": ("#CC6677", "o"),
    "flashinfer.two_shot": ("#DDCC77", "s"),
    "flashinfer.mnnvl": ("#661100", "D"),
    "symm_mem.one_shot": ("#999933", "o"),
    "symm_mem.two_shot": ("#117733", "s"),
    "multimem": ("#AA4499", "D"),
    "custom": ("#44AA99", "^"),
    "nccl": ("#777777", "v"),
    "nccl_symm": ("#882255", "P"),
    "gloo": ("#777777", "v"),
}
OTHER_STYLE = ("#222222", "X")

RATIO_TOP = 2.0  # a path this much slower than the best is out of the race
CHARACTER_INCHES = 0.075  # of the strip's labels
FOOT = 0.2  # share of the time axis kept free for the crossovers' sizes
LABEL_SHARE = 0.13  # of the size axis, taken by one such size


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


def scale_axes(upper: Axes, lower: Axes, columns: Sequence[Points]) -> None:
    """Equal scales in all panels; room under the lowest line for the crossovers' sizes."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    sizes = [size for column in columns for size in column.sizes]
    powers = range(math.floor(math.log2(min(sizes))), math.ceil(math.log2(max(sizes))) + 1)
    ticks = [2**power for power in powers[:: math.ceil(len(powers) / 8)]]
    for ax in (upper, lower):
        ax.set_xscale("log", base=2)
        ax.set_xlim(2.0 ** (powers[0] - 0.3), 2.0 ** (powers[-1] + 0.3))
        ax.set_xticks(ticks, [format_size(tick) for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("message size")
    times = [s.median for column in columns for row in column.spans for s in row.values()]
    decades = max(math.log10(max(times) / min(times)), 0.3)
    upper.set_yscale("log")
    upper.set_ylim(min(times) * 10 ** (-FOOT * decades), max(times) * 10 ** (0.05 * decades))
    locator = LogLocator(subs=(1, 2, 5)) if decades >= 1 else MaxNLocator(6)
    upper.yaxis.set_major_locator(locator)
    upper.yaxis.set_minor_locator(NullLocator())
    upper.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    top = ratio_top([column.ratios() for column in columns])
    lower.set_ylim(1 - 0.04 * (top - 1), top)


def ratio_top(ratios: Sequence[Sequence[Sequence[float]]]) -> float:
    """At most ``RATIO_TOP``, unless the runners-up are mostly slower than that everywhere."""
    slowest = max(row[-1] for rows in ratios for row in rows)
    runners_up = min(median([row[min(1, len(row) - 1)] for row in rows]) for rows in ratios)
    return min(max(RATIO_TOP, 1.2 * runners_up), max(1.1, 1 + 1.15 * (slowest - 1)))


def draw_lines(upper: Axes, lower: Axes, column: Points, table: Table | None) -> None:
    """Every path's medians with their interval; a broad shade where the plan runs the path."""
    nan = Interval(math.nan, math.nan, math.nan)
    chosen = [table.band_at(size).path if table else "" for size in column.sizes]
    for name in column.names:
        color, marker = _look(name)
        dashes = "--" if is_unfused(name) else "-"
        spans = [row.get(name, nan) for row in column.spans]
        for ax, units in ((upper, [1.0] * len(spans)), (lower, column.best)):
            pairs = list(zip(spans, units, strict=True))
            medians = [span.median / unit for span, unit in pairs]
            ax.fill_between(column.sizes, [span.low / unit for span, unit in pairs],
                            [span.high / unit for span, unit in pairs],
                            color=color, alpha=0.22, linewidth=0)  # fmt: skip
            ax.plot(column.sizes, medians, dashes, color=color, linewidth=1.3, label=name,
                    marker=marker, markersize=3.6, markeredgewidth=0)  # fmt: skip
            runs = [m if p == name else math.nan for m, p in zip(medians, chosen, strict=True)]
            ax.plot(column.sizes, runs, "-", color=color, linewidth=6, alpha=0.3,
                    solid_capstyle="round")  # fmt: skip


def _look(path: str) -> tuple[str, str]:
    return STYLES.get(all_reduce_of(path), OTHER_STYLE)


def draw_strip(ax: Axes, table: Table, column: Points, inches: float) -> None:
    """A bar above ``ax`` in the colours of the paths the plan runs, named where there is room."""
    left, right = ax.get_xlim()
    inches_per_octave = (inches - 0.9) / math.log2(right / left)
    for band in table.bands:
        start = max(band.min_bytes, column.sizes[0])  # nothing is claimed where none was measured
        end = min(band.end_bytes or right, column.sizes[-1])
        if end <= start:
            continue
        color, _ = _look(band.path)
        ax.fill_between([start, end], 1.04, 1.15, color=color, linewidth=0, clip_on=False,
                        transform=ax.get_xaxis_transform())  # fmt: skip
        room = math.log2(end / start) * inches_per_octave / CHARACTER_INCHES
        names = [n for n in (band.path, all_reduce_of(band.path)) if len(n) < room]
        if names:
            ax.text(math.sqrt(start * end), 1.09, names[0], color=_ink(color), fontsize=8,
                    ha="center", va="center", transform=ax.get_xaxis_transform())  # fmt: skip


def _ink(color: str) -> str:
    """Black or white, whichever can be read on ``color`` (luma as in ITU-R BT.601)."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#ffffff"


def mark_changes(upper: Axes, lower: Axes, table: Table, column: Points) -> None:
    """A line through both rows where the plan changes path, its size at the foot of the upper one.

    Shaded: from the last measured size before it to the first one at or above it.
    """
    left, right = (math.log2(limit) for limit in upper.get_xlim())
    edges = [
        b.min_bytes
        for before, b in pairwise(table.bands)
        if b.path != before.path and b.min_bytes <= column.sizes[-1]
    ]
    taken = [-1.0, -1.0]  # how far right each of the two lines of text is used, as a share
    word = "crossover " if len(edges) == 1 else ""
    for edge in edges:
        above = max((size for size in column.sizes if size < edge), default=edge)
        below = min(size for size in column.sizes if size >= edge)
        for ax in (upper, lower):
            ax.axvspan(above, below, color="#000000", alpha=0.05, lw=0)
            ax.axvline(edge, color="#222222", linewidth=0.9, linestyle=":")
        place = (math.log2(edge) - left) / (right - left)
        flipped = place > 0.8 or (word and place > 0.5)
        label = word + rounded_size(edge)
        start = place - LABEL_SHARE if flipped else place
        free = [line for line, used in enumerate(taken) if used <= start]
        if not free:  # three changes within a tenth of the axis: the line alone must do
            continue
        taken[free[0]] = start + LABEL_SHARE
        upper.annotate(label, (edge, 0.03 + 0.075 * free[0]),
                       xycoords=upper.get_xaxis_transform(), fontsize=8.5, fontweight="bold",
                       xytext=(-4 if flipped else 4, 0), textcoords="offset points",
                       ha="right" if flipped else "left", color="#222222",
                       bbox={"facecolor": "#ffffff", "linewidth": 0, "pad": 1})  # fmt: skip
