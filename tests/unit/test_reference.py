"""docs/reference.md says what the code does: every variable, every exit code, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fusewise
from fusewise import errors
from fusewise.commands import doctor
from fusewise.commands.app import app
from fusewise.commands.options import INTERRUPTED
from fusewise.engines import registry
from fusewise.errors import FusewiseError
from fusewise.profiles import store

SOURCES = Path(fusewise.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference.md").read_text("utf-8")
OURS, OTHERS, CODES = PAGE.split("\n## ")[1:]


def words() -> set[str]:
    """Every string of our sources that is the name of a variable and nothing else."""
    return {
        node.value
        for file in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", node.value)
    }  # fmt: skip


def asked() -> Iterator[str]:
    """What is looked up in an environment: ``environ.get("X")``, ``environ["X"]``, ``"X" in``."""
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            where = key = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                where, key = node.func.value, node.args[0]
            elif isinstance(node, ast.Subscript):
                where, key = node.value, node.slice
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
                where, key = node.comparators[0], node.left
            if where is None or "environ" not in ast.unparse(where):
                continue
            if isinstance(key, ast.Constant) and re.fullmatch("[A-Z][A-Z0-9_]+", str(key.value)):
                yield str(key.value)


def named(text: str) -> set[str]:
    """The variables in the first column of a table."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row)}


def test_our_variables_are_those_on_the_page() -> None:
    switches = {f"FUSEWISE_{name.upper()}" for name in registry.names()}
    used = {word for word in words() if word.startswith("FUSEWISE_")} | switches
    assert named(OURS) == used
    assert named(OURS) <= set(doctor.SWITCHES), "`fusewise doctor` shows each"


def test_others_variables_that_are_read_are_on_the_page_and_no_invented_ones() -> None:
    families = ("CUDA_", "FLASHINFER_", "NCCL_", "PYTORCH_", "SGLANG_", "TORCH_", "VLLM_")
    read = {name for name in asked() if not name.startswith("FUSEWISE_")}
    read |= {word for word in words() if word.startswith(families)}
    assert {"NCCL_NVLS_ENABLE", "WORLD_SIZE", "VLLM_BATCH_INVARIANT"} <= read
    assert read - named(OTHERS) == set()
    sources = "\n".join(file.read_text() for file in SOURCES.rglob("*.py"))
    assert [name for name in named(OTHERS) if name not in sources] == []


def test_the_defaults_on_the_page_are_the_ones_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewise.backends.native.cuda.cubin_cache import default_folder
    from fusewise.commands import measuring

    monkeypatch.setenv("HOME", "/nobody")
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_DIRS", "XDG_CACHE_HOME", *named(OURS)):
        monkeypatch.delenv(name, raising=False)
    rows = {line.split("`")[1]: line for line in OURS.splitlines() if line.startswith("| `")}
    for name, default in (
        ("FUSEWISE_HOME", store.user_dir({}).parent),
        ("FUSEWISE_SITE_DIR", store.site_dir({})),
        ("FUSEWISE_CACHE_DIR", default_folder().parent),
        ("FUSEWISE_MEASURING_LOCK", Path(measuring._LOCK)),
    ):
        shown = str(default).replace("/nobody", "~")
        assert f"| `{shown}` |" in rows[name]


def kinds(base: type[FusewiseError]) -> Iterator[type[FusewiseError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", CODES.replace("`", ""), re.MULTILINE)
    shown = {int(code): what for code, what in rows}
    ours = {kind.exit_code for kind in kinds(FusewiseError) if kind.__module__ == errors.__name__}
    assert shown == errors.EXIT_CODES, "the page and `fusewise --help` say the same"
    assert set(shown) == ours | {0, INTERRUPTED}


def test_the_models_that_decode_knows_are_those_named_to_people() -> None:
    from fusewise.decode.models import SHAPES

    help_text = " ".join(CliRunner().invoke(app, ["decode", "--help"]).stdout.split())
    page = (
        (DOCS / "decode.md").read_text("utf-8").replace("`", "").split("Shapes: ")[1].split(";")[0]
    )
    assert ", ".join(page.replace(",", " ").split()) == ", ".join(SHAPES)
    assert f"{', '.join(SHAPES)}. Default: tiny on CPUs." in help_text
