"""One picture of a profile: time over message size, who wins, and where the winner changes.

Upper row: median time of every path (log–log) with its interval. Lower row: the same divided by
the fastest path's time, where a lead of a few percent can be seen. The strip between them shows
which path the plan runs. Nothing here decides, and nothing opens a window: figures are made
without pyplot. Equal profiles give equal files, byte by byte.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusewise.errors import InputError
from fusewise.operation import is_unfused
from fusewise.profiles.bands import Plan
from fusewise.profiles.schema import Profile
from fusewise.report.crossings import FUSABLE
from fusewise.report.panel import Points, draw_lines, draw_strip, mark_changes, scale_axes
from fusewise.report.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ACROSS = 3
PANEL_INCHES = {1: 7.6, 2: 5.0, 3: 3.9}  # per panel, by panels side by side

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
    columns = {hidden_size: Points(rows, order) for hidden_size, rows in points.items()}
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
        scale_axes(upper, lower, list(columns.values()))
        table = plan.table_for(FUSABLE, hidden_size)
        draw_lines(upper, lower, column, table)
        if table is not None:
            draw_strip(lower, table, column, PANEL_INCHES[across])
            mark_changes(upper, lower, table, column)
    for spare in panels[len(columns) :]:
        for ax in spare:
            ax.remove()
    _legend(fig, [upper for upper, _ in panels[: len(columns)]], across)
    title = f"all_reduce → + residual → RMSNorm on {caption(profile)}"
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    return fig


def _legend(fig: Figure, axes: Sequence[Axes], across: int) -> None:
    """One legend for all panels, fused paths first."""
    handles: dict[str, Any] = {}
    for ax in axes:
        found, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    names = sorted(handles, key=is_unfused)
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
