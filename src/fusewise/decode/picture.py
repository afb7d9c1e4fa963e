"""The picture of a decode run: each arm's speed over the unfused arm's, by size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewise.decode.results import records
from fusewise.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {"decode": "decode, by batch size", "prefill": "prefill, by tokens"}


def save(rows: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Writes SVG or PNG, by the suffix of ``file``.

    Raises:
        InputError: another suffix.
        OSError: the file cannot be written.
    """
    if file.suffix.lower() not in (".svg", ".png"):
        raise InputError("unknown picture format", expected=".svg or .png", got=str(file))
    import matplotlib as mpl
    from matplotlib.figure import Figure

    made = records(rows)
    phases = list(dict.fromkeys(row["phase"] for row in made))
    with mpl.rc_context({"svg.hashsalt": "fusewise", "svg.fonttype": "none", "font.size": 9}):
        fig = Figure(figsize=(5.4 * len(phases), 3.8), layout="constrained")
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
        for axes, phase in zip(fig.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
            _panel(axes, [row for row in made if row["phase"] == phase], phase)
        fig.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)


def _panel(axes: Axes, rows: list[dict[str, Any]], phase: str) -> None:
    """One line per arm with its interval; the unfused arm is the line at 1."""
    sizes = sorted({row["tokens"] for row in rows})
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for i, arm in enumerate(arms):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["tokens"])
        at = [sizes.index(row["tokens"]) + 0.06 * (i - len(arms) / 2) for row in mine]
        middle = [row["ratio"] for row in mine]
        below = [row["ratio"] - row["ratio_low"] for row in mine]
        above = [row["ratio_high"] - row["ratio"] for row in mine]
        axes.errorbar(at, middle, yerr=[below, above], marker="o", ms=3.5, capsize=2, label=arm)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_title(_TITLES[phase], loc="left", fontsize=9)
    axes.set_ylabel("tokens/s ÷ unfused")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
