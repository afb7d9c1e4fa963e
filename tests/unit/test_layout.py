"""The design's layout, kept: imports run one way, rooms stay small, no torch where none is due."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fusewise

ROOT = Path(fusewise.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the bottom up: a layer imports from itself and from those above it in this list.
LAYERS = (
    ("errors", "shape"),
    ("node", "intervals", "profile", "bands", "vllm_tables", "thresholds"),
    ("plan", "store", "cap", "audit", "group", "workspace"),
    ("kernels",),
    ("backends",),
    ("agreement", "border"),
    ("communicator",),
    ("ops",),
    ("worker", "teams", "launch", "tuning", "graph"),
    ("report", "decode", "integrations"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

TORCH_FREE = (
    "errors", "shape", "node", "intervals", "profile", "bands", "vllm_tables", "thresholds",
    "plan", "store", "cap", "audit", "launch", "teams", "report", "commands", "cli",
)  # fmt: skip


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> list[str]:
    """The rooms a file imports, anywhere in it, except for type checking only."""
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
    if room(file) == "__init__":
        return
    assert room(file) in LEVEL, f"{room(file)} has no place in the layout"
    upward = [name for name in imported(file) if LEVEL[name] > LEVEL[room(file)]]
    assert upward == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_is_a_room_and_a_function_fits_on_a_screen(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 300
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a room says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_kernels_know_no_tables_and_the_plan_knows_no_torch() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert not {"plan", "bands", "thresholds", "vllm_tables"} & set(imported(file)), file
    code = "import sys; import fusewise.plan, fusewise.audit; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_torch_free_rooms_import_no_torch() -> None:
    names = [
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
        for file in FILES
        if room(file) in TORCH_FREE and file.name != "__init__.py"
    ]
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


def test_no_file_names_a_machine_or_leaves_work_undone() -> None:
    unwanted = ("TO" + "DO", "FIX" + "ME", "/home/", "/root/")
    for file in FILES:
        text = file.read_text()
        assert not [word for word in unwanted if word in text], file
