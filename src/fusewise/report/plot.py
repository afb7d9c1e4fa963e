"""One picture of a profile: time over message size, who wins, and where the winner changes.

Upper row: median time of every path (log–log) with its interval. Lower row: the same divided by
the fastest path's time, where a lead of a few percent can be seen. The strip between them shows
which path the plan runs. Nothing here decides, and nothing opens a window: figures are made
without pyplot. Equal profiles give equal files, byte by byte.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusewise.bands import Plan, Table
from fusewise.errors import InputError
from fusewise.intervals import Interval, median, median_interval
from fusewise.profile import UNFUSED_SUFFIX, Profile, Sample
from fusewise.report.crossings import FUSABLE, rounded_size
from fusewise.report.table import printable
from fusewise.shape import Shape, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "muted" scheme, made for colour-blind readers (personal.sron.nl/~pault). A backend
# keeps its colour and marker in every picture; fused paths are solid, unfused ones dashed.
STYLES: Mapping[str, tuple[str, str]] = {
    "native.one_shot": ("#332288", "o"),
    "native.two_shot": ("#88CCEE", "s"),
    "shm.one_shot": ("#332288", "o"),
    "flashinfer.one_shot": ("#CC6677", "o"),
    "flashinfer.two_shot": ("#DDCC77", "s"),
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
MAX_ACROSS = 3
PANEL_INCHES = {1: 7.6, 2: 5.0, 3: 3.9}  # per panel, by panels side by side
CHARACTER_INCHES = 0.075  # of the strip's labels
FOOT = 0.2  # share of the time axis kept free for the crossovers' sizes
LABEL_SHARE = 0.13  # of the size axis, taken by one such size

_RC = {
    "svg.hashsalt": "fusewise",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def save(profile: Profile, plan: Plan, file: Path) -> None:
    """Writes the picture as SVG or PNG, by the suffix of ``file``.

    Raises:
        InputError: another suffix, or a profile without a fusable operation.
        OSError: the file cannot be written.
    """
    suffix = file.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise InputError("unknown picture format", expected=".svg or .png", got=str(file))
    file.write_bytes(picture(profile, plan, "svg" if suffix == ".svg" else "png"))


def picture(profile: Profile, plan: Plan, kind: Literal["svg", "png"]) -> bytes:
    """The picture's bytes, without date or version in them.

    Raises:
        InputError: the profile has no sample of ``all_reduce_rms_norm``.
    """
    metadata: dict[str, str | None] = {"Title": caption(profile)}
    metadata |= {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with _settings():
        figure(profile, plan).savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def caption(profile: Profile) -> str:
    """One line for a title: device, ranks, fabric, dtype."""
    mark = profile.fingerprint
    fabric = mark.fabric + (" with multicast" if mark.multicast else "")
    return f"{printable(mark.device)}, {mark.world_size} ranks, {fabric}, {profile.dtype}"


@contextmanager
def _settings() -> Iterator[None]:
    """Our settings over matplotlib's defaults, whatever the user's matplotlibrc says."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def figure(profile: Profile, plan: Plan) -> Figure:
    """The figure: a panel of two rows per hidden size, three panels side by side at most.

    Raises:
        InputError: the profile has no sample of ``all_reduce_rms_norm``.
    """
    from matplotlib.figure import Figure

    points = profile.points(FUSABLE)
    if not points:
        raise InputError("nothing to draw", expected=f"samples of {FUSABLE}", got="none")
    order = [path.name for path in profile.paths]
    columns = {hidden_size: _Column(rows, order) for hidden_size, rows in points.items()}
    across = min(len(columns), MAX_ACROSS)
    down = math.ceil(len(columns) / across)
    fig = Figure(figsize=(PANEL_INCHES[across] * across, 4.4 * down + 1), layout="constrained")
    grid = fig.subplots(2 * down, across, squeeze=False, height_ratios=[1.5, 1] * down)
    panels = [(grid[2 * d][a], grid[2 * d + 1][a]) for d in range(down) for a in range(across)]
    for i, (hidden_size, column) in enumerate(columns.items()):
        upper, lower = panels[i]
        upper.set_title(f"hidden {hidden_size}", loc="left", fontsize=10, fontweight="bold")
        if i % across == 0:
            upper.set_ylabel("time per call, µs")
            lower.set_ylabel("time ÷ fastest")
        _axes(upper, lower, list(columns.values()))
        table = plan.table_for(FUSABLE, hidden_size)
        _lines(upper, lower, column, table)
        if table is not None:
            _strip(lower, table, column, PANEL_INCHES[across])
            _mark_changes(upper, lower, table, column)
    for spare in panels[len(columns) :]:
        for ax in spare:
            ax.remove()
    _legend(fig, [upper for upper, _ in panels[: len(columns)]], across)
    title = f"all_reduce → + residual → RMSNorm on {caption(profile)}"
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    return fig


class _Column:
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

    def runner_up(self) -> float:
        """How much slower the second-fastest path is, typically."""
        ordered = [sorted(span.median for span in row.values()) for row in self.spans]
        return median([times[1] / times[0] for times in ordered if len(times) > 1] or [1.0])


def _axes(upper: Axes, lower: Axes, columns: Sequence[_Column]) -> None:
    """Equal scales in all panels; room under the lowest line for the crossovers' sizes."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

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
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_minor_locator(NullLocator())
    upper.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    top = max(RATIO_TOP, 1.2 * min(column.runner_up() for column in columns))
    lower.set_ylim(1 - 0.04 * (top - 1), top)


def _lines(upper: Axes, lower: Axes, column: _Column, table: Table | None) -> None:
    """Every path's medians with their interval; a broad shade where the plan runs the path."""
    nan = Interval(math.nan, math.nan, math.nan)
    chosen = [table.band_at(size).path if table else "" for size in column.sizes]
    for name in column.names:
        color, marker = _look(name)
        dashes = "--" if name.endswith(UNFUSED_SUFFIX) else "-"
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
    return STYLES.get(path.removesuffix(UNFUSED_SUFFIX), OTHER_STYLE)


def _strip(ax: Axes, table: Table, column: _Column, inches: float) -> None:
    """A bar above ``ax`` in the colours of the paths the plan runs, named where there is room."""
    left, right = ax.get_xlim()
    inches_per_octave = (inches - 0.9) / math.log2(right / left)
    for band in table.bands:
        start = max(band.min_bytes, left)
        end = min(band.end_bytes or right, column.sizes[-1])
        if end <= start:
            continue
        color, _ = _look(band.path)
        ax.fill_between([start, end], 1.04, 1.15, color=color, linewidth=0, clip_on=False,
                        transform=ax.get_xaxis_transform())  # fmt: skip
        room = math.log2(end / start) * inches_per_octave / CHARACTER_INCHES
        names = [n for n in (band.path, band.path.removesuffix(UNFUSED_SUFFIX)) if len(n) < room]
        if names:
            ax.text(math.sqrt(start * end), 1.09, names[0], color=_ink(color), fontsize=8,
                    ha="center", va="center", transform=ax.get_xaxis_transform())  # fmt: skip


def _ink(color: str) -> str:
    """Black or white, whichever can be read on ``color`` (luma as in ITU-R BT.601)."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#ffffff"


def _mark_changes(upper: Axes, lower: Axes, table: Table, column: _Column) -> None:
    """A line through both rows where the plan changes path, its size at the foot of the upper one.

    Shaded: from the last measured size before it to the first one at or above it.
    """
    left, right = (math.log2(limit) for limit in upper.get_xlim())
    edges = [b.min_bytes for b in table.bands if 0 < b.min_bytes <= column.sizes[-1]]
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


def _legend(fig: Figure, axes: Sequence[Axes], across: int) -> None:
    """One legend for all panels, fused paths first."""
    handles: dict[str, Any] = {}
    for ax in axes:
        found, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    names = sorted(handles, key=lambda name: name.endswith(UNFUSED_SUFFIX))
    fig.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols={1: 3, 2: 4, 3: 5}[across],
        frameon=False,
        fontsize=8.5,
        handlelength=2.6,
        columnspacing=1.2,
    )
