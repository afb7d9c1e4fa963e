"""One picture of a profile: time over message size, who wins, and where the winner changes.

A panel per hidden size. Nothing here decides. Equal profiles give equal files, byte by byte. An
SVG needs no package; a PNG is drawn by matplotlib, the ``plot`` extra.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fusewise.errors import InputError
from fusewise.operation import is_unfused
from fusewise.profiles.bands import Plan
from fusewise.profiles.schema import Profile
from fusewise.report import drawing
from fusewise.report.colors import color_of
from fusewise.report.crossings import FUSABLE
from fusewise.report.drawing import Drawing, Item, Line, Words, moved, width_of
from fusewise.report.panel import HEIGHT, dashes, dot, panel
from fusewise.report.scales import Points, scales
from fusewise.report.table import printable

_ACROSS = 3
_WIDTHS = {1: 640.0, 2: 470.0, 3: 400.0}  # of a panel, by panels side by side, px
_MARGIN, _GAP, _TITLE = 16.0, 24.0, 34.0
_ENTRY = 11.0  # the legend's letters
_LINE = 18.0


def save(profile: Profile, plan: Plan, file: Path) -> None:
    """Writes the picture as SVG or PNG, by the suffix of ``file``.

    Raises:
        InputError: another suffix, or a profile without a fusable operation.
        UnavailableError: a PNG without matplotlib.
        OSError: the file cannot be written.
    """
    drawing.save(picture(profile, plan), title(profile), file)


def caption(profile: Profile) -> str:
    """One line for a title: device, ranks, fabric, dtype."""
    mark = profile.fingerprint
    fabric = mark.fabric + (" with multicast" if mark.multicast else "")
    return f"{printable(mark.device)}, {mark.world_size} ranks, {fabric}, {profile.dtype}"


def title(profile: Profile) -> str:
    """What the picture shows, for readers and for those who cannot see it."""
    return f"all_reduce → + residual → RMSNorm on {caption(profile)}"


def panels(profile: Profile, plan: Plan, width: float) -> dict[int, Drawing]:
    """hidden_size → its panel, all with the same scales.

    Raises:
        InputError: the profile has no sample of ``all_reduce_rms_norm``.
    """
    points = profile.points(FUSABLE)
    if not points:
        raise InputError("nothing to draw", expected=f"samples of {FUSABLE}", got="none")
    order = [path.name for path in profile.paths]
    columns = {hidden_size: Points(rows, order) for hidden_size, rows in points.items()}
    shared = scales(list(columns.values()))
    return {
        hidden_size: Drawing(
            width,
            HEIGHT,
            tuple(panel(column, plan.table_for(FUSABLE, hidden_size), shared, hidden_size, width)),
        )
        for hidden_size, column in columns.items()
    }


def paths_drawn(profile: Profile) -> list[str]:
    """Every path of the picture, fused ones first."""
    drawn = {sample.path for sample in profile.samples if sample.op == FUSABLE}
    return sorted((p.name for p in profile.paths if p.name in drawn), key=is_unfused)


def picture(profile: Profile, plan: Plan) -> Drawing:
    """All panels on one sheet, three side by side at most, with a title and a legend.

    Raises:
        InputError: the profile has no sample of ``all_reduce_rms_norm``.
    """
    across = min(len(profile.points(FUSABLE)) or 1, _ACROSS)
    parts = list(panels(profile, plan, _WIDTHS[across]).values())
    width = 2 * _MARGIN + across * _WIDTHS[across] + (across - 1) * _GAP
    items: list[Item] = [Words((_MARGIN, 24), title(profile), size=13)]
    for i, part in enumerate(parts):
        row, place = divmod(i, across)
        dx = _MARGIN + place * (_WIDTHS[across] + _GAP)
        items += moved(part.items, dx, _TITLE + _MARGIN + row * (HEIGHT + _GAP))
    rows = math.ceil(len(parts) / across)
    top = _TITLE + _MARGIN + rows * HEIGHT + (rows - 1) * _GAP + _LINE
    entries, height = _legend(paths_drawn(profile), width - 2 * _MARGIN)
    items += moved(entries, _MARGIN, top)
    return Drawing(width, top + height, tuple(items))


def _legend(paths: Sequence[str], width: float) -> tuple[list[Item], float]:
    """The paths in columns as wide as the longest name; and how high that is, px."""
    column = max(width_of(path, _ENTRY) for path in paths) + 52
    across = max(1, min(len(paths), int(width // column)))
    items: list[Item] = []
    for i, path in enumerate(paths):
        row, place = divmod(i, across)
        items += moved([*key(path), Words((36, 4), path, size=_ENTRY)], place * column, row * _LINE)
    return items, math.ceil(len(paths) / across) * _LINE


def key(path: str) -> list[Item]:
    """A path's line and marker, 28 px wide around y = 0."""
    line = Line(((0, 0), (28, 0)), color_of(path), 1.6, dashes(path))
    return [line, dot((14, 0), path, 3.5)]
