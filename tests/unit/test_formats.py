"""docs/formats.md against what the commands print, field by field, and every line 80 wide."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fusewise.commands.app import app
from fusewise.commands.verify import _COLUMNS as VERIFY_COLUMNS
from fusewise.decode import results
from fusewise.node import Fingerprint
from fusewise.profiles import store
from fusewise.profiles.compare import compare
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Exclusion
from fusewise.report.bench_table import bench, header
from fusewise.report.comparison import comparison
from fusewise.report.records import tables
from fusewise.report.table import SCHEMA_VERSION, Section
from fusewise.report.text import as_text, render_sections
from fusewise.tune.settings import Settings
from fusewise.tune.stack import Row
from tests.samples import FUSED, UNFUSED, profile_of
from tests.unit.test_decode_arms import ROWS

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
COMMANDS = {
    "explain": "explain 256K --profile nvidia-h200-tp8 --engine vllm --version 0.22",
    "audit": "audit --version 0.22 --profile nvidia-h200-tp8",
    "cap": "cap --version 0.22 --profile nvidia-h200-tp8",
    "vllm check": "vllm check --version 0.22 --profile nvidia-h200-tp8",
    "doctor": "doctor",
    "profile list": "profile list",
}


def documented() -> dict[str, dict[str, list[str]]]:
    """Command → table → fields; the main table's name ends in a star."""
    found: dict[str, dict[str, list[str]]] = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[2:]:
        heads = part.partition("\n")[0].split(", ")
        for table in re.split(r"^### ", part, flags=re.MULTILINE)[1:]:
            name = table.partition("\n")[0]
            cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
            fields = [field for cell in cells for field in re.findall(r"`(\w+)`", cell)]
            for head in heads:
                found.setdefault(head, {})[re.sub(r"\*\*(.*)\*\*", r"\1*", name)] = fields
    return found


def printed(words: str, fmt: str = "json") -> str:
    result = CliRunner().invoke(app, [*words.split(), "--format", fmt])
    assert result.exit_code == 0, result.output
    return result.stdout


def sections_of(command: str) -> list[Section]:
    """Those of commands that measure, from made-up measurements."""
    if command == "profile compare":
        first = profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}})
        second = profile_of({1: {FUSED: 9.0, UNFUSED: 8.0}})
        second = second.model_copy(
            update={"fingerprint": second.fingerprint.model_copy(update={"torch": "9.9"})}
        )
        return comparison(first, second, compare(first, second), True)
    if command in ("show", "tune", "profile show"):
        profile = store.load("nvidia-h200-tp2")
        left_out = (Exclusion(backend="multimem", reason="no multicast"),)
        profile = profile.model_copy(update={"excluded": left_out})
        return tables(profile, derive(profile))
    if command == "bench":
        node = Fingerprint(device_type="cuda", device="X", world_size=2, fabric="nv18")
        head = header(Settings("bfloat16", (2048,), 4096, 2**20, 1.0), node)
        return bench(store.load("nvidia-h200-tp2").samples, "bfloat16", 2, None, head)
    if command == "verify":
        return [Section("verify", VERIFY_COLUMNS, [Row("nccl"), Row("multimem", "not here")])]
    assert command == "decode"
    return [results.section(ROWS, "a title", [])]


def json_of(command: str) -> Any:
    words = COMMANDS.get(command)
    return json.loads(printed(words) if words else render_sections(sections_of(command), "json"))


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # doctor shows them, and a path is never cut: none wider than a terminal
    monkeypatch.setenv("FUSEWISE_HOME", "home")
    monkeypatch.setenv("FUSEWISE_MEASURING_LOCK", "measuring.lock")


@pytest.mark.parametrize("command", documented())
def test_the_page_names_every_table_and_field_in_order(command: str) -> None:
    document, page = json_of(command), documented()[command]
    assert document.pop("schema_version") == SCHEMA_VERSION
    assert list(document) == [name.rstrip("*") for name in page]
    for name, fields in page.items():
        table = document[name.rstrip("*")]
        assert list(table) == ["rows", "notes"]
        for row in table["rows"]:
            known = [key for key in row if not key.isupper()]
            if "VARIABLE" in fields:
                assert len(known) < len(row)
            assert known == [field for field in fields if field != "VARIABLE"], name
            assert all(value is None or isinstance(value, str | int | float)
                       for value in row.values()), "flat"  # fmt: skip
        assert table["rows"] or (command, name) in EMPTY


EMPTY = {("explain", "engine")}


def test_every_command_with_a_format_is_on_the_page() -> None:
    import typer

    def with_format(group: Any, *names: str) -> list[str]:
        inner = getattr(group, "commands", {})
        here = [" ".join(names)] if any("--format" in p.opts for p in group.params) else []
        return here + [
            one for name, each in inner.items() for one in with_format(each, *names, name)
        ]

    assert set(with_format(typer.main.get_command(app))) == set(documented())


@pytest.mark.parametrize("command", documented())
def test_csv_is_the_main_table_with_one_head(command: str) -> None:
    (main,) = [name for name in documented()[command] if name.endswith("*")]
    words, name = COMMANDS.get(command), main.rstrip("*")
    text = printed(words, "csv") if words else render_sections(
        sections_of(command), "csv", main=name)  # fmt: skip
    rows = list(csv.reader(io.StringIO(text)))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) == 1 + len(json_of(command)[name]["rows"])
    assert rows[0] == list(json_of(command)[name]["rows"][0])


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("command", documented())
def test_every_table_fits_its_terminal(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """audit broke rows at 80 columns, show even at 120."""
    if command in COMMANDS:
        shown: list[Section] = []
        monkeypatch.setattr(
            "fusewise.commands.output.render_sections",
            lambda sections, fmt, **_: shown.extend(sections) or "",
        )
        printed(COMMANDS[command], "table")
    else:
        shown = sections_of(command)
    pasted = {line for section in shown for line in section.verbatim}
    for line in as_text(shown, width).splitlines():
        assert len(line) <= width or line in pasted
        assert line == line.rstrip()
