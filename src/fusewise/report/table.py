"""Tables as data: columns, records, and the forms for machines and documents. Pure.

Text and Markdown show the columns, rounded; how text fits a terminal is ``text.py``'s. JSON and CSV
carry the data: every field under its own key, units in the names, full precision. What they hold
is described in docs/formats.md. Nothing here prints, and nothing here decides.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Format = Literal["table", "json", "csv", "md"]
Align = Literal["left", "right"]
FORMATS: tuple[Format, ...] = get_args(Format)

SCHEMA_VERSION = 1  # of the JSON documents; grows when a field goes or changes its meaning
UNBROKEN_CHARS = 32  # the longest path name is 28
# C0, DEL and C1; and Unicode's bidirectional controls, which make text read as it is not written.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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
        drop: where a terminal is too narrow the highest goes first; 0 stays.
    """

    key: str
    title: str
    unit: str = ""
    form: str = ""
    align: Align = "left"
    star: tuple[str, Any] | None = None
    drop: int = 0

    @property
    def head(self) -> str:
        """Title and unit: ``time µs``."""
        return f"{self.title} {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Section:
    """One table of a report.

    Args:
        name: its key in the JSON document; sections of one name are one table there.
        columns: what text and Markdown show, in order.
        records: mappings or dataclass instances; each has every column's key.
        title: a line above it in text and Markdown.
        notes: sentences under it; ``notes`` in JSON.
        data: what JSON and CSV hold, where that is not ``records``: scalar fields, each record
            with the same ones.
        verbatim: lines to paste, under it in text and Markdown, never folded.
    """

    name: str
    columns: tuple[Column, ...]
    records: Sequence[Any]
    title: str | None = None
    notes: tuple[str, ...] = ()
    data: Sequence[Any] | None = None
    verbatim: tuple[str, ...] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The data, as JSON and CSV have it."""
        return [as_dict(row) for row in (self.records if self.data is None else self.data)]


FACT_COLUMNS = (Column("fact", "fact"), Column("value", "value"))


def facts(
    name: str,
    record: Mapping[str, Any],
    shown: Sequence[tuple[str, Any]],
    title: str | None = None,
    verbatim: tuple[str, ...] = (),
) -> Section:
    """One record, shown as two columns; a value of None has no line there."""
    rows = [{"fact": key, "value": value} for key, value in shown if value is not None]
    return Section(name, FACT_COLUMNS, rows, title, data=[dict(record)], verbatim=verbatim)


def document(sections: Sequence[Section]) -> dict[str, Any]:
    """The JSON document: a table per name, each with ``rows`` and ``notes``."""
    made: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for section in sections:
        table = made.setdefault(section.name, {"rows": [], "notes": []})
        table["rows"] += section.rows
        table["notes"] += [note for note in section.notes if note not in table["notes"]]
    return made


def as_json(sections: Sequence[Section]) -> str:
    """See ``document``; a row a line, for people and for diffs.

    Raises:
        ValueError: a field is NaN or infinite; JSON has no such numbers.
    """
    made = document(sections)
    parts = [f"  {_json(key)}: {_table_json(value)}" for key, value in made.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _table_json(value: Any) -> str:
    if not isinstance(value, dict):
        return _json(value)
    members = []
    for key, items in value.items():
        lines = ",\n".join(f"      {_json(item)}" for item in items)
        members.append(f"    {_json(key)}: [\n{lines}\n    ]" if lines else f"    {_json(key)}: []")
    return "{\n" + ",\n".join(members) + "\n  }"


def as_csv(sections: Sequence[Section], main: str | None = None) -> str:
    """One table, that of the name ``main`` or the first: a head and rows of one width."""
    name = main or sections[0].name
    chosen = [section for section in sections if section.name == name]
    rows = [row for section in chosen for row in section.rows]
    known = {key: None for row in rows for key in row}
    keys = known or {column.key: None for section in chosen for column in section.columns}
    out = io.StringIO()
    writer = csv.DictWriter(out, list(keys), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def as_markdown(sections: Sequence[Section]) -> str:
    """A Markdown table each, with its title and notes."""
    return "\n".join(_markdown(section) for section in spoken(sections))


def spoken(sections: Sequence[Section]) -> list[Section]:
    """Those that people are shown: one without records and notes says nothing."""
    if len(sections) == 1:
        return list(sections)
    return [section for section in sections if section.records or section.notes]


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
    """``text`` with control characters spelled out: ``\\x1b``, ``\\u202e``."""
    return _CONTROL.sub(lambda match: _spelled(ord(match[0])), text)


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def cells(section: Section) -> list[list[str]]:
    """The shown cells of text, Markdown and HTML, row by row."""
    rows = [as_dict(record) for record in section.records]
    return [[_cell(row, column) for column in section.columns] for row in rows]


def _cell(row: Mapping[str, Any], column: Column) -> str:
    starred = column.star is not None and row[column.star[0]] == column.star[1]
    return ("*" if starred else "") + cell_text(row[column.key], column.form)


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
    title = (section.title or "").splitlines()
    if len(title) > 1:
        lines[:0] = ["```", *map(printable, title), "```", ""]
    elif title:
        lines[:0] = [f"### {_escape_markdown(printable(title[0]))}", ""]
    if section.notes:
        lines += ["", *(f"- {_escape_markdown(printable(note))}" for note in section.notes)]
    if section.verbatim:
        lines += ["", "```", *map(printable, section.verbatim), "```"]
    return "\n".join(lines) + "\n"


def _escape_markdown(text: str) -> str:
    """A path's name keeps its underscores readable: between letters they mean nothing."""
    marks = r"([\\|*`\[\]~]|(?<!\w)_|_(?!\w))"
    return re.sub(marks, r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
