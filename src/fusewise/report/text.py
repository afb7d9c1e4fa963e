"""Tables in the form asked for; as aligned text no wider than the terminal. Prints nothing.

A table that is too wide is narrowed in this order: cells of several words fold at their blanks (a
path before its ``+``), the widest column first; then columns go, by ``Column.drop``, and a line
says which. What still does not fit is left to the terminal. A pipe has no width: all is shown.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fusewise.errors import InputError
from fusewise.report.table import (
    FORMATS,
    UNBROKEN_CHARS,
    Column,
    Format,
    Section,
    as_csv,
    as_json,
    as_markdown,
    cells,
    printable,
    spoken,
)

_GAP = "  "
_LEAST_SENTENCE = 24  # a folded sentence narrower than this is hard to read
_LEFT_OUT = "Left out for want of room: {}. A wider window, or --format md, shows them."
_STYLES = {"fuse": "32", "do not fuse": "33", "inconclusive": "2"}  # green, yellow, dim

Paint = Callable[[str, str], str]


@dataclass(frozen=True)
class _Grid:
    """The columns that are shown, with their heads, cells and widths."""

    columns: tuple[Column, ...]
    rows: list[list[str]]
    widths: list[int]
    dropped: tuple[Column, ...] = ()

    @property
    def width(self) -> int:
        return sum(self.widths) + len(_GAP) * (len(self.widths) - 1)


def render_sections(
    sections: Sequence[Section],
    fmt: Format,
    *,
    terminal: bool | None = None,
    main: str | None = None,
) -> str:
    """Several tables in one format, ending in a newline.

    Args:
        sections: in order.
        fmt: ``table``, ``json``, ``csv`` or ``md``.
        terminal: for ``table``: fitted to the terminal and coloured unless ``NO_COLOR`` is set, or
            plain and as wide as it takes; by default whether stdout is a terminal.
        main: the one table of CSV; by default the first.

    Raises:
        InputError: unknown format.
        KeyError: a record lacks a column's field.
        ValueError: a field is NaN or infinite and the format is JSON, which has no such numbers.
    """
    if fmt not in FORMATS:
        raise InputError("unknown format", expected=", ".join(FORMATS), got=repr(fmt))
    if fmt == "json":
        return as_json(sections)
    if fmt == "csv":
        return as_csv(sections, main)
    if fmt == "md":
        return as_markdown(sections)
    if not (sys.stdout.isatty() if terminal is None else terminal):
        return as_text(sections)
    styled = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return as_text(sections, shutil.get_terminal_size().columns, styled)


def as_text(sections: Sequence[Section], width: int | None = None, styled: bool = False) -> str:
    """Every section that has something to say, a blank line between.

    Args:
        sections: in order.
        width: columns of the terminal; None: as wide as it takes.
        styled: with colours.
    """
    paint = _painted if styled else _bare
    return "\n".join(
        "\n".join(_lines(section, width, paint)) + "\n" for section in spoken(sections)
    )


def _painted(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style and text.strip() else text


def _bare(text: str, style: str) -> str:
    return text


def _lines(section: Section, width: int | None, paint: Paint) -> Iterator[str]:
    if section.title:
        for line in printable_lines(section.title):
            yield from (paint(part, "1") for part in _folded_note(line, width))
    notes = list(section.notes)
    if section.records or not notes:  # a section with nothing but a note shows no empty head
        grid = _fitted(section, width)
        yield from _grid_lines(grid, paint)
        if grid.dropped:
            names = ", ".join(
                column.title.replace("\n.", ".").replace("\n", " ") for column in grid.dropped
            )
            notes.insert(0, _LEFT_OUT.format(names))
    for note in notes:
        yield from (paint(line, "2") for line in _folded_note(printable(note), width))
    yield from map(printable, section.verbatim)


def printable_lines(text: str) -> list[str]:
    """Its lines, control characters spelled out."""
    return [printable(line) for line in text.split("\n")]


def _folded_note(note: str, width: int | None) -> list[str]:
    if width is None or len(note) <= width:
        return [note]
    return textwrap.wrap(note, width, break_long_words=False, break_on_hyphens=False)


def _fitted(section: Section, width: int | None) -> _Grid:
    grid = _natural(section.columns, cells(section))
    while width is not None and grid.width > width:
        narrowed = _narrowed(grid, width)
        if narrowed.width <= width:
            return narrowed
        droppable = [column for column in grid.columns if column.drop]
        if not droppable:
            return narrowed
        grid = _without(grid, max(droppable, key=lambda column: column.drop))
    return grid


def _natural(columns: tuple[Column, ...], rows: list[list[str]]) -> _Grid:
    widths = [
        max(len(part) for part in (*column.head.split("\n"), *(row[i] for row in rows)))
        for i, column in enumerate(columns)
    ]
    return _Grid(columns, rows, widths)


def _without(grid: _Grid, column: Column) -> _Grid:
    at = grid.columns.index(column)
    columns = grid.columns[:at] + grid.columns[at + 1 :]
    rows = [row[:at] + row[at + 1 :] for row in grid.rows]
    return replace(_natural(columns, rows), dropped=(*grid.dropped, column))


def _narrowed(grid: _Grid, width: int) -> _Grid:
    """Left-aligned columns folded, the widest first, as far as needed and possible."""
    widths = list(grid.widths)
    least = [
        _least_width(column, [row[i] for row in grid.rows]) if column.align == "left" else widths[i]
        for i, column in enumerate(grid.columns)
    ]
    excess = grid.width - width
    while excess > 0 and any(w > low for w, low in zip(widths, least, strict=True)):
        free = [i for i in range(len(widths)) if widths[i] > least[i]]
        at = max(free, key=lambda i: widths[i])
        widths[at] -= 1
        excess -= 1
    return replace(grid, widths=widths)


def _least_width(column: Column, texts: list[str]) -> int:
    """What folding cannot narrow: the longest word, or a line of a sentence."""
    heads = [len(part) for part in column.head.split("\n")]
    words = [len(word) for text in texts for word in _words(text)]
    sentence = any(len(text) > UNBROKEN_CHARS for text in texts)
    return max([*heads, *words, _LEAST_SENTENCE if sentence else 0])


def _words(text: str) -> list[str]:
    """Where a cell may break: at blanks, but a path's ``+`` stays with what follows it."""
    return text.replace(" + ", " +\xa0").split(" ")


def _folded(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    lines = [""]
    for word in _words(text):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return [line.replace("\xa0", " ") for line in lines if line] or [""]


def _grid_lines(grid: _Grid, paint: Paint) -> Iterator[str]:
    heads = [column.head.split("\n") for column in grid.columns]
    depth = max(map(len, heads), default=0)
    heads = [[""] * (depth - len(head)) + head for head in heads]
    for line in zip(*heads, strict=True):
        yield _aligned(grid, list(line), ["1"] * len(line), paint)
    for row in grid.rows:
        folded = [_folded(cell, width) for cell, width in zip(row, grid.widths, strict=True)]
        styles = [_style(cell) for cell in row]
        for k in range(max(map(len, folded))):
            yield _aligned(
                grid, [cell[k] if k < len(cell) else "" for cell in folded], styles, paint
            )


def _aligned(grid: _Grid, parts: list[str], styles: list[str], paint: Paint) -> str:
    """One line, without blanks at its end."""
    last = max((i for i, part in enumerate(parts) if part), default=-1)
    made = []
    for i, part in enumerate(parts[: last + 1]):
        right = grid.columns[i].align == "right"
        pad = "" if i == last and not right else " " * (grid.widths[i] - len(part))
        made.append(pad + paint(part, styles[i]) if right else paint(part, styles[i]) + pad)
    return _GAP.join(made)


def _style(cell: str) -> str:
    return "1" if cell.startswith("*") else _STYLES.get(cell, "")
