"""The design's layout, kept: imports run one way, rooms stay small, no torch where none is due."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusewise

ROOT = Path(fusewise.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
REPOSITORY = ROOT.parents[1]
ROOMS = sorted(
    file for part in ("src", "tests", "benchmarks") for file in (REPOSITORY / part).rglob("*.py")
)

# From the bottom up: a folder imports from itself and from the levels before it.
ORDER = (
    ("errors", "shape", "node"),
    ("operation",),
    ("profiles",),
    ("ranks",),
    ("backends",),
    ("run",),
    ("tune", "graph", "engines"),
    ("report", "decode", "integrations"),
    ("commands",),
    ("__main__",),
)
# A file of ours as pages name it: in code, by its name or with folders in front.
FILE = re.compile(r"`(?:\.\./)*((?:[\w-]+/)*[\w-]+\.(?:py|cuh?|sh))`")
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# Reading commands start without torch: these rooms, or single files of them, never import it.
TORCH_FREE = (
    "errors", "shape", "node", "operation", "profiles", "report", "commands",
    "backends/registry", "ranks/supervisor", "ranks/teams", "tune/settings", "tune/sweep",
    "engines/audit", "engines/base", "engines/cap", "engines/plugin", "engines/registry",
    "engines/releases",
    "engines/vllm/dispatch", "engines/vllm/engine", "engines/vllm/tables",
    "engines/sglang/dispatch", "engines/sglang/engine", "engines/sglang/tables",
)  # fmt: skip


def folder(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> list[str]:
    """The folders a file imports, anywhere in it, except for type checking only."""
    tree = ast.parse(file.read_text())
    found: list[str] = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [n.split(".")[1] for n in names if n.startswith("fusewise.")]
        stack += ast.iter_child_nodes(node)
    return [name for name in found if name in LEVEL]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    if folder(file) == "__init__":
        return
    assert folder(file) in LEVEL, f"{folder(file)} has no place in the layout"
    others = [name for name in imported(file) if name != folder(file)]
    assert [name for name in others if LEVEL[name] > LEVEL[folder(file)]] == []


def test_the_design_shows_the_same_order() -> None:
    shown = " → ".join(", ".join(names) for names in ORDER)
    design = (REPOSITORY / "docs" / "design.md").read_text("utf-8")
    assert shown in " ".join(design.split())


def test_the_top_level_holds_folders_and_a_few_files_of_words() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 6


@pytest.mark.parametrize("file", ROOMS, ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_a_file_is_a_room_and_a_function_fits_on_a_screen(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 300
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a room says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_a_file_for_another_compiler_is_a_room_too() -> None:
    kinds = (".cu", ".cuh", ".cpp", ".h", ".css", ".sh")
    files = [f for part in ("src", "tests", "benchmarks")
             for f in (REPOSITORY / part).rglob("*") if f.suffix in kinds]  # fmt: skip
    assert len(files) > 10
    assert not [file for file in files if file.read_text("utf-8").count("\n") > 300]


def test_the_torch_free_rooms_import_no_torch() -> None:
    places = [file.relative_to(ROOT).with_suffix("").as_posix() for file in FILES]
    free = [p for p in places if any(p == f or p.startswith(f"{f}/") for f in TORCH_FREE)]
    names = [f"fusewise.{place.replace('/', '.')}".removesuffix(".__init__") for place in free]
    assert len(names) > len(TORCH_FREE)
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names!r}]; "
    code += "assert 'torch' not in sys.modules, 'torch'; assert 'numpy' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "command",
    [
        "show nvidia-h200-tp8",
        "explain 256K --profile nvidia-h200-tp8",
        "audit --engine vllm --version 0.33 --profile nvidia-h200-tp8",
        "cap --engine vllm --profile nvidia-h200-tp8",
        "profile list",
        "profile compare tp2 tp8",
        "report --profile nvidia-h200-tp8 --output -",
    ],
)
def test_reading_commands_never_import_torch_or_numpy(command: str) -> None:
    """What keeps them under half a second of CPU; ``benchmarks/startup.py`` measures it."""
    code = (
        "import sys; sys.argv[1:] = sys.argv[1].split(); from fusewise.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, command], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_what_benchmarks_import_is_there() -> None:
    """Also what only a GPU would have them import."""
    imported = 0
    for file in (REPOSITORY / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusewise"):
                exec(compile(ast.unparse(node), str(file), "exec"), {})
                imported += 1
    assert imported > 50


def test_the_pages_name_files_that_exist() -> None:
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"),
             *(REPOSITORY / "benchmarks").rglob("*.md")]  # fmt: skip
    there = [p.as_posix() for part in ("src", "tests", "benchmarks", "docs", "constraints")
             for p in (REPOSITORY / part).rglob("*")]  # fmt: skip
    named = {name for page in pages for name in FILE.findall(page.read_text("utf-8"))}
    assert len(named) > 30
    assert not {name for name in named if not any(p.endswith("/" + name) for p in there)}


def test_no_file_names_a_machine_or_leaves_work_undone() -> None:
    unwanted = ("TO" + "DO", "FIX" + "ME", "/home/", "/root/")
    for file in FILES:
        text = file.read_text()
        assert not [word for word in unwanted if word in text], file
