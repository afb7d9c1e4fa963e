"""The picture of a decode run: each arm's speed over the unfused arm's, by size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusewise.decode.results import records
from fusewise.report import drawing
from fusewise.report.colors import color_of
from fusewise.report.drawing import Drawing, Item, Line, Words, moved, width_of
from fusewise.report.panel import dot
from fusewise.report.scales import even_ticks

_TITLES = {"decode": "decode, by batch size", "prefill": "prefill, by tokens"}
# An arm has no path of its own: it borrows the looks of these, the unfused one first.
_LOOKS = ("nccl", "native.one_shot", "flashinfer.one_shot", "symm_mem.two_shot", "multimem",
          "custom", "symm_mem.one_shot", "nccl_symm")  # fmt: skip
_WIDTH, _TOP, _BOTTOM, _LEFT = 520.0, 40.0, 280.0, 46.0
_MARGIN, _SMALL, _ENTRY = 16.0, 10.0, 11.0


def save(rows: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Writes SVG or PNG, by the suffix of ``file``.

    Raises:
        InputError: another suffix.
        UnavailableError: a PNG without matplotlib.
        OSError: the file cannot be written.
    """
    drawing.save(picture(rows, title), title, file)


def picture(rows: Sequence[dict[str, Any]], title: str) -> Drawing:
    """A panel per phase, side by side, with the arms' names under them."""
    made = records(rows)
    phases = list(dict.fromkeys(row["phase"] for row in made))
    arms = list(dict.fromkeys(row["arm"] for row in made))
    looks = {arm: _LOOKS[i % len(_LOOKS)] for i, arm in enumerate(arms)}
    items: list[Item] = [Words((_MARGIN, 24), title, size=13)]
    for i, phase in enumerate(phases):
        shown = [row for row in made if row["phase"] == phase]
        items += moved(list(_panel(shown, phase, looks)), _MARGIN + i * (_WIDTH + 24), 40)
    x = _MARGIN
    for arm, look in looks.items():
        line = Line(((0, 0), (28, 0)), color_of(look), 1.6)
        name = Words((36, 4), arm, size=_ENTRY)
        items += moved([line, dot((14, 0), look, 3.5), name], x, _BOTTOM + 92)
        x += width_of(arm, _ENTRY) + 60
    width = max(2 * _MARGIN + len(phases) * (_WIDTH + 24) - 24, x)
    return Drawing(width, _BOTTOM + 112, tuple(items))


def _panel(rows: list[dict[str, Any]], phase: str, looks: dict[str, str]) -> Iterator[Item]:
    """One line per arm with its intervals; the unfused arm is the line at 1."""
    sizes = sorted({row["tokens"] for row in rows})
    step = (_WIDTH - _LEFT) / len(sizes)
    low: float = min(1.0, *(row["ratio_low"] for row in rows))
    high: float = max(1.0, *(row["ratio_high"] for row in rows))
    room = max(high - low, 0.02) * 0.06
    low, high = low - room, high + room

    def y(ratio: float) -> float:
        return _BOTTOM - (ratio - low) / (high - low) * (_BOTTOM - _TOP)

    yield Words((0, 12), _TITLES[phase], size=13, bold=True)
    yield Words((_LEFT, _TOP - 7), "tokens/s ÷ unfused", "soft", _SMALL)
    for tick in even_ticks(low, high):
        yield Line(((_LEFT, y(tick)), (_WIDTH, y(tick))), "line")
        yield Words((_LEFT - 6, y(tick) + 3.5), f"{tick:.6g}", "soft", _SMALL, "end")
    for i, size in enumerate(sizes):
        place = (_LEFT + (i + 0.5) * step, _BOTTOM + 15)
        yield Words(place, str(size), "soft", _SMALL, "middle")
    for n, (arm, look) in enumerate(looks.items()):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["tokens"])
        beside = (n - (len(looks) - 1) / 2) * min(7.0, step / (len(looks) + 1))
        line = []
        for row in mine:
            x = _LEFT + (sizes.index(row["tokens"]) + 0.5) * step + beside
            line.append((x, y(row["ratio"])))
            ends = ((x, y(row["ratio_low"])), (x, y(row["ratio_high"])))
            yield Line(ends, color_of(look), 3, (), 0.35)
        if line:
            yield Line(tuple(line), color_of(look), 1.4)
        yield from (dot(place, look) for place in line)
