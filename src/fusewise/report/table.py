"""Flat records and an ordered column spec → text, JSON, CSV or Markdown. Pure; knows no profile.

All four forms come from the same records. JSON and CSV carry every field under its own key
(units in the names, full precision); text and Markdown show the columns, rounded. Nothing here
prints, and nothing here decides. rich is imported only for a terminal.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fusewise.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

Format = Literal["table", "json", "csv", "md"]
Align = Literal["left", "right"]
FORMATS: tuple[Format, ...] = get_args(Format)

UNBROKEN_CHARS = 32  # the longest path name is 28
_STYLES = {"fuse": "green", "do not fuse": "yellow", "inconclusive": "dim"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        key: the field of the record, unit included: ``time_us``.
        title: the head in text and Markdown; long ones may be broken with newlines.
        unit: shown behind the title there; empty for none.
        form: a ``format()`` spec for numbers in text and Markdown, such as ``.2f`` or ``+.2f``.
        align: numbers right, words left.
        star: (field, value): in text and Markdown a star marks the cell of a record whose field
            has that value.
    """

    key: str
    title: str
    unit: str = ""
    form: str = ""
    align: Align = "left"
    star: tuple[str, Any] | None = None

    @property
    def head(self) -> str:
        """Title and unit: ``time µs``."""
        return f"{self.title} {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Section:
    """One table of a report: ``name`` is its key where several share a JSON document."""

    name: str
    columns: tuple[Column, ...]
    records: Sequence[Any]
    title: str | None = None
    notes: tuple[str, ...] = ()


def render(
    records: Sequence[Any],
    columns: Sequence[Column],
    fmt: Format,
    *,
    title: str | None = None,
    notes: Sequence[str] = (),
    terminal: bool | None = None,
) -> str:
    """One table in one format, ending in a newline.

    Args:
        records: mappings or dataclass instances with scalar fields; None is an empty cell or null.
        columns: what text and Markdown show, in order. Every record has every column's key.
        fmt: ``table``, ``json``, ``csv`` or ``md``.
        title: a line above the table; CSV has none.
        notes: lines under the table, ``notes`` in JSON; CSV has none.
        terminal: for ``table``: rich output, or plain aligned text; by default whether stdout is
            a terminal. ``NO_COLOR`` is honoured.

    Raises:
        InputError: unknown format.
        KeyError: a record lacks a column's field.
        ValueError: a field is NaN or infinite and the format is JSON, which has no such numbers.
    """
    return render_sections(
        [Section("", tuple(columns), records, title, tuple(notes))], fmt, terminal=terminal
    )


def render_sections(
    sections: Sequence[Section], fmt: Format, *, terminal: bool | None = None
) -> str:
    """Several tables in one format; see ``render``.

    A nameless single section is the JSON document itself; named ones are its members. In CSV
    each table of several has a ``# name`` line above it and a blank line between.
    """
    if fmt not in FORMATS:
        raise InputError("unknown format", expected=", ".join(FORMATS), got=repr(fmt))
    if fmt == "json":
        return _json(sections)
    if fmt == "csv":
        marked = len(sections) > 1
        return "\n".join((f"# {s.name}\n" if marked else "") + _csv(s) for s in sections)
    if fmt == "md":
        return "\n".join(_markdown(section) for section in sections)
    if sys.stdout.isatty() if terminal is None else terminal:
        return _terminal(sections)
    return "\n".join(_plain(section) for section in sections)


def as_dict(record: Any) -> dict[str, Any]:
    """A record's fields, in order: a mapping's items or a dataclass instance's fields."""
    return dict(record) if isinstance(record, Mapping) else dataclasses.asdict(record)


def cell_text(value: Any, form: str = "") -> str:
    """A value as people read it: rounded by ``form``; None is empty, a zero has no minus sign.

    Control characters, which could move a terminal's cursor, become visible escapes.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        text = format(value, form)
        return format(0.0, form) if text.startswith("-") and not text.strip("-0.,%") else text
    return printable(" ".join(str(value).splitlines()))


def printable(text: str) -> str:
    """``text`` with control characters spelled out: ``\\x1b``."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def cells(section: Section) -> list[list[str]]:
    """The shown cells of text, Markdown and HTML, row by row."""
    rows = [as_dict(record) for record in section.records]
    return [[_cell(row, column) for column in section.columns] for row in rows]


def _cell(row: Mapping[str, Any], column: Column) -> str:
    starred = column.star is not None and row[column.star[0]] == column.star[1]
    return ("*" if starred else "") + cell_text(row[column.key], column.form)


def _json(sections: Sequence[Section]) -> str:
    documents = {
        section.name: {
            "title": section.title,
            "rows": [as_dict(record) for record in section.records],
            "notes": list(section.notes),
        }
        for section in sections
    }
    document: Any = documents[""] if list(documents) == [""] else documents
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(section: Section) -> str:
    rows = [as_dict(record) for record in section.records]
    keys = {key: None for row in rows for key in row} or {c.key: None for c in section.columns}
    out = io.StringIO()
    writer = csv.DictWriter(out, list(keys), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    """JSON's words for booleans, control characters visible, numbers as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    return printable(value) if isinstance(value, str) else value


def _markdown(section: Section) -> str:
    rule = ["---:" if column.align == "right" else "---" for column in section.columns]
    heads = [_escape_markdown(column.head).replace("\n", "<br>") for column in section.columns]
    rows = [[_escape_markdown(cell) for cell in row] for row in cells(section)]
    lines = [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]
    if section.title:
        lines[:0] = [f"### {_escape_markdown(printable(section.title))}", ""]
    if section.notes:
        lines += ["", *(f"- {_escape_markdown(printable(note))}" for note in section.notes)]
    return "\n".join(lines) + "\n"


def _escape_markdown(text: str) -> str:
    """A path's name keeps its underscores readable: between letters they mean nothing."""
    marks = r"([\\|*`\[\]~]|(?<!\w)_|_(?!\w))"
    return re.sub(marks, r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")


def _plain(section: Section) -> str:
    """Aligned words and nothing else: two blanks between columns, no rules, no colour.

    A section without a record but with a note to say so shows no empty head.
    """
    columns = section.columns if section.records or not section.notes else ()
    heads = [column.head.split("\n") for column in columns]
    depth = max(map(len, heads), default=0)
    rows = [list(row) for row in zip(*([""] * (depth - len(h)) + h for h in heads), strict=True)]
    rows += cells(section) if columns else []
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    pads: list[Callable[[str, int], str]] = [
        str.rjust if column.align == "right" else str.ljust for column in columns
    ]
    lines = [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
        for row in rows
    ]
    if section.title:
        lines.insert(0, printable(section.title))
    lines += [printable(note) for note in section.notes]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _terminal(sections: Sequence[Section]) -> str:
    """rich tables as wide as the terminal, or as wide as unbroken numbers need."""
    import shutil

    from rich.console import Console

    tables = [_rich_table(section) for section in sections]
    out = io.StringIO()
    wide = Console(width=10_000, file=io.StringIO())
    needed = [wide.measure(table).minimum for table in tables]
    width = max(shutil.get_terminal_size().columns, *needed)
    no_color = bool(os.environ.get("NO_COLOR"))
    console = Console(file=out, force_terminal=True, no_color=no_color, width=width, emoji=False)
    for i, (section, table) in enumerate(zip(sections, tables, strict=True)):
        if i:
            console.print()
        console.print(table)
        for note in section.notes:
            console.print(printable(note), markup=False, highlight=False, style="dim")
    return out.getvalue()


def _rich_table(section: Section) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = Text(printable(section.title), style="bold") if section.title else None
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    rows = cells(section)
    for i, column in enumerate(section.columns):
        parts = [part for text in (column.head, *(row[i] for row in rows)) for part in _parts(text)]
        table.add_column(
            Text(column.head), justify=column.align, min_width=max(map(len, parts), default=0)
        )
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    return table


def _parts(text: str) -> list[str]:
    """What must stay on one line: short cells whole, sentences word by word."""
    return text.splitlines() if len(text) <= UNBROKEN_CHARS else text.split()


def _style(cell: str) -> str:
    return "bold" if cell.startswith("*") else _STYLES.get(cell, "")
