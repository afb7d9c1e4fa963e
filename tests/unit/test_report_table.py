"""Tables: every format from one record, rounding at its boundaries, nothing escapes a cell."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from fusewise.errors import InputError
from fusewise.report.table import FORMATS, Column, Section, cell_text, facts
from fusewise.report.text import as_text, render_sections

COLUMNS = (
    Column("size_bytes", "size", "B", align="right"),
    Column("time_us", "time", "µs", ".2f", align="right"),
    Column("verdict", "verdict"),
)
RECORDS = [
    {"size_bytes": 4096, "time_us": 5.123456789, "verdict": "fuse", "hidden_size": 2048},
    {"size_bytes": 67108864, "time_us": None, "verdict": "do not fuse", "hidden_size": 4096},
]


def render(records, columns, fmt, *, title=None, notes=(), terminal=None):
    """One table."""
    section = Section("t", tuple(columns), records, title, tuple(notes))
    return render_sections([section], fmt, terminal=terminal)


def table(text):
    return json.loads(text)["t"]


def test_plain_text_is_aligned_and_bare():
    text = render(RECORDS, COLUMNS, "table", title="sizes", notes=["a note"], terminal=False)
    assert text.splitlines() == [
        "sizes",
        "  size B  time µs  verdict",
        "    4096     5.12  fuse",
        "67108864           do not fuse",
        "a note",
    ]
    assert text.endswith("a note\n")


def test_json_keeps_every_field_and_full_precision():
    document = json.loads(render(RECORDS, COLUMNS, "json", title="sizes", notes=["a note"]))
    assert document == {
        "schema_version": 1, "t": {"rows": RECORDS, "notes": ["a note"]},
    }  # fmt: skip


def test_json_has_a_row_a_line():
    text = render(RECORDS, COLUMNS, "json", notes=["a note"])
    assert sum('"hidden_size"' in line for line in text.splitlines()) == len(RECORDS)


def test_csv_parses_back_with_units_in_the_keys():
    rows = list(csv.DictReader(io.StringIO(render(RECORDS, COLUMNS, "csv", notes=["a note"]))))
    assert list(rows[0]) == ["size_bytes", "time_us", "verdict", "hidden_size"]
    assert float(rows[0]["time_us"]) == 5.123456789
    assert rows[1]["time_us"] == ""
    assert len(rows) == 2


def test_csv_without_records_still_has_its_head():
    assert render([], COLUMNS, "csv") == "size_bytes,time_us,verdict\n"


def test_markdown_has_one_rule_and_as_many_cells_in_every_row():
    lines = render(RECORDS, COLUMNS, "md", title="sizes", notes=["a note"]).splitlines()
    assert lines[0] == "### sizes"
    assert lines[2:6] == [
        "| size B | time µs | verdict |",
        "| ---: | ---: | --- |",
        "| 4096 | 5.12 | fuse |",
        "| 67108864 |  | do not fuse |",
    ]
    assert lines[-1] == "- a note"


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.0049, ".2f", "0.00"),
        (0.0051, ".2f", "0.01"),
        (-0.0049, ".2f", "0.00"),
        (-0.0051, ".2f", "-0.01"),
        (-0.0049, "+.2f", "+0.00"),
        (9.994, ".2f", "9.99"),
        (9.996, ".2f", "10.00"),
        (0.0194, ".0%", "2%"),
        (-0.004, ".0%", "0%"),
        (-0.006, ".0%", "-1%"),
        (-5, "", "-5"),
        (0, "", "0"),
        (None, ".2f", ""),
        (True, ".2f", "yes"),
        (False, "", "no"),
        ("two\nlines", "", "two lines"),
        ("\x1b[2Jgone", "", "\\x1b[2Jgone"),
        ("\u202aa\u202e, \u2066b\u2069", "", "\\u202aa\\u202e, \\u2066b\\u2069"),
        ("\u202f\u2065\u206a", "", "\u202f\u2065\u206a"),
    ],
)
def test_cells(value, form, text):
    assert cell_text(value, form) == text


@dataclass(frozen=True)
class Row:
    size_bytes: int
    time_us: float | None
    verdict: str


def test_dataclasses_are_records_too():
    row = Row(8, 1.5, "fuse")
    assert table(render([row], COLUMNS, "json"))["rows"] == [
        {"size_bytes": 8, "time_us": 1.5, "verdict": "fuse"}
    ]
    assert render([row], COLUMNS, "table", terminal=False).splitlines()[1].split() == [
        "8", "1.50", "fuse",
    ]  # fmt: skip


NASTY = 'a|b, "c" <script>\n[red]\x1b[31m'


def test_nothing_breaks_out_of_its_cell():
    record = {"size_bytes": 1, "time_us": 1.0, "verdict": NASTY}
    md = render([record], COLUMNS, "md").splitlines()
    assert len(md) == 3
    assert len(re.findall(r"(?<!\\)\|", md[2])) == 4
    assert "<script>" not in md[2]
    assert table(render([record], COLUMNS, "json"))["rows"][0]["verdict"] == NASTY
    parsed = list(csv.reader(io.StringIO(render([record], COLUMNS, "csv"))))
    assert [len(row) for row in parsed] == [3, 3]
    terminal = render([record], COLUMNS, "table", terminal=True)
    assert "[red]" in terminal
    assert "\x1b[31m" not in terminal


def test_a_terminal_gets_colour_unless_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = render(RECORDS, COLUMNS, "table", terminal=True)
    assert "\x1b[32mfuse" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = render(RECORDS, COLUMNS, "table", terminal=True)
    assert "\x1b[32m" not in plain
    assert "do not fuse" in plain


WIDE = (
    Column("size", "size", align="right"),
    Column("time_us", "time\nµs", "", ".2f", "right"),
    Column("path", "path"),
    Column("tokens", "tokens", align="right", drop=2),
    Column("why", "why", drop=1),
)
WHY = "it is the fastest of all that were measured here"
WIDE_ROWS = [
    {"size": "4K", "time_us": 5.0, "path": "flashinfer.one_shot", "tokens": 1, "why": WHY},
    {"size": "64M", "time_us": 12345.0, "path": "symm_mem.two_shot + rms_norm", "tokens": 16384,
     "why": ""},
]  # fmt: skip


def lines(width):
    return as_text([Section("wide", WIDE, WIDE_ROWS)], width).splitlines()


def test_as_wide_as_it_takes_without_a_terminal_and_no_blanks_at_the_end():
    whole = lines(None)
    assert len(whole) == 4
    assert WHY in whole[2]
    assert all(line == line.rstrip() for width in (None, 90, 60, 40) for line in lines(width))


@pytest.mark.parametrize("width", range(47, 110))
def test_a_table_keeps_its_width_and_every_number_whole(width):
    text = "\n".join(lines(width))
    assert all(len(line) <= width for line in text.splitlines())
    assert "12345.00" in text
    assert "flashinfer.one_shot" in text


def test_sentences_fold_before_columns_go_and_columns_go_in_their_order():
    def left_out(width):
        return re.findall(r"Left out for want of room: (.*?)\.", " ".join(lines(width)))

    assert left_out(107) == []
    assert len(lines(107)) == 4
    assert left_out(80) == []  # folded: the sentence within its column, the path before its +
    assert any(line.endswith("+ rms_norm") for line in (one.strip() for one in lines(74)))
    assert left_out(60) == ["tokens, why"]
    assert "tokens" not in lines(66)[1]
    assert left_out(66) == ["tokens"]


def test_what_cannot_be_narrowed_is_left_to_the_terminal():
    text = "\n".join(lines(10))
    assert "12345.00" in text
    assert "…" not in text


def test_lines_to_paste_are_never_folded():
    flag = "--a-flag '" + "x " * 60 + "'"
    section = facts("s", {"flag": flag}, [("a", 1), ("b", None)], "T", ("To paste:", flag))
    text = as_text([section], 40)
    assert f"\n{flag}\n" in text
    assert "b " not in text.replace(flag, "")
    assert f"```\nTo paste:\n{flag}\n```" in render_sections([section], "md")


def test_a_pipe_is_plain(capsys):
    assert render(RECORDS, COLUMNS, "table") == render(RECORDS, COLUMNS, "table", terminal=False)


def test_sections_share_one_document():
    sections = [
        Section("sizes", COLUMNS, RECORDS, "the sizes"),
        Section("paths", (Column("path", "path"),), [{"path": "nccl"}], notes=("cited",)),
    ]
    document = json.loads(render_sections(sections, "json"))
    assert document["sizes"]["rows"] == RECORDS
    assert document["paths"] == {"rows": [{"path": "nccl"}], "notes": ["cited"]}
    assert render_sections(sections, "md").count("---") == 4
    assert "\n\npath\nnccl\ncited\n" in render_sections(sections, "table", terminal=False)


def test_sections_of_one_name_are_one_table_and_csv_is_one_table():
    one, two = ({"dtype": name, "x": None} for name in ("a", "b"))
    columns = (Column("dtype", "dtype"),)
    sections = [
        Section("xs", columns, [one], notes=("n",)),
        Section("other", (Column("y", "y"),), [{"y": 1}]),
        Section("xs", columns, [], notes=("n",), data=[two]),
    ]
    document = json.loads(render_sections(sections, "json"))
    assert document["xs"] == {"rows": [one, two], "notes": ["n"]}
    assert render_sections(sections, "csv") == "dtype,x\na,\nb,\n"
    assert render_sections(sections, "csv", main="other") == "y\n1\n"


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_records_is_a_table_too(fmt):
    assert render([], COLUMNS, fmt, terminal=False).endswith("\n")


def test_wrong_use_is_refused():
    with pytest.raises(InputError, match="expected table, json, csv, md, got 'xml'"):
        render(RECORDS, COLUMNS, "xml")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="time_us"):
        render([{"size_bytes": 1, "verdict": ""}], COLUMNS, "table")
    with pytest.raises(ValueError, match="JSON"):
        render([{"size_bytes": float("nan")}], (Column("size_bytes", "size"),), "json")


def test_importing_it_brings_nothing_heavy():
    code = (
        "import sys, fusewise.report.text;"
        "heavy = {'torch', 'numpy', 'rich', 'pydantic', 'matplotlib'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert run.returncode == 0
