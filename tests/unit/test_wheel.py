"""The wheel: what is in it, what it says of itself, and that it runs where nothing else is.

The clean environment borrows this one's packages by path, so that torch is not fetched again; of
fusewise it has the wheel alone.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "fusewise"

# What our code imports → the distribution that brings it. The second group comes with one of them.
PACKAGES = {
    "torch": "torch", "typer": "typer", "rich": "rich", "pydantic": "pydantic",
    "platformdirs": "platformdirs", "numpy": "numpy", "filelock": "filelock",
    "pynvml": "nvidia-ml-py", "matplotlib": "matplotlib", "cuda": "cuda-core",
    "flashinfer": "flashinfer-python", "vllm": "vllm", "transformers": "transformers",
    "triton": "torch", "sympy": "torch", "click": "typer", "sglang": "sglang",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree; by the installed hatchling, else by one that pip fetches."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    if importlib.util.find_spec("hatchling") is None:
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), "."]
    made = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    (file,) = folder.glob("*.whl")
    return file


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {name for name in names if name.startswith("fusewise/")}
    rest = names - ours
    assert {name.split("/")[0] for name in rest} == {
        name for name in {n.split("/")[0] for n in rest} if name.endswith(".dist-info")
    }
    there = {
        f"fusewise/{file.relative_to(SOURCES).as_posix()}"
        for file in SOURCES.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert ours == there
    assert not [name for name in names if re.search("test|emulator|benchmark", name)]
    for needed in ("py.typed", "report/page.css", "profiles/data/nvidia-h200-tp8.json",
                   "backends/native/cuda/one_shot.cu"):  # fmt: skip
        assert f"fusewise/{needed}" in ours
    assert [name for name in rest if name.endswith("LICENSE")]


def test_it_says_where_it_comes_from_and_asks_for_what_it_imports(wheel: Path) -> None:
    told = metadata(wheel)
    urls = dict(line.split(", ", 1) for line in told.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= urls.keys()
    needs = told.get_all("Requires-Dist", [])
    always = {re.split(r"[ >=<\[;]", need)[0] for need in needs if "extra ==" not in need}
    asked = {re.split(r"[ >=<\[;]", need)[0] for need in needs}
    assert "matplotlib" not in always
    assert [need for need in needs if need.startswith("matplotlib") and "'plot'" in need]
    imported = third_parties()
    assert imported - PACKAGES.keys() == set()
    assert {PACKAGES[name] for name in imported} <= asked
    assert {PACKAGES[name] for name in imported} & always >= {"torch", "filelock", "pydantic"}


def third_parties() -> set[str]:
    """Every package that some file imports."""
    found: set[str] = set()
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"fusewise"}


def test_links_of_its_long_description_lead_somewhere_outside_the_repository(wheel: Path) -> None:
    text = str(metadata(wheel).get_payload())
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 5
    home = "https://github.com/fusewise/fusewise/"
    for target in targets:
        assert target.startswith("https://"), target
        if target.startswith(home):
            kind, branch, path = target.removeprefix(home).split("#")[0].split("/", 2)
            assert (kind in ("blob", "raw"), branch) == (True, "main")
            assert (ROOT / path).is_file(), target


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder of an environment with the wheel."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home / "env", with_pip=False, symlinks=True)
    python = home / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    # After the installation: pip must not see this environment's own fusewise.
    (packages,) = (home / "env" / "lib").glob("python*/site-packages")
    others = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return home / "env" / "bin"


def run(clean: Path, tmp_path: Path, *command: str) -> str:
    """Its stdout, run from an empty folder with nothing of this process's environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FUSEWISE"))}
    kept |= {"FUSEWISE_HOME": str(tmp_path), "FUSEWISE_MEASURING_LOCK": str(tmp_path / "lock")}
    words = [str(clean / command[0]), *command[1:]]
    made = subprocess.run(
        words, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, (command, made.stderr)
    return made.stdout


def test_its_commands_run_where_only_the_wheel_is(clean: Path, tmp_path: Path) -> None:
    where = run(clean, tmp_path, "python", "-c", "import fusewise; print(fusewise.__file__)")
    assert Path(where.strip()).is_relative_to(clean.parent)
    seed = ("--profile", "nvidia-h200-tp8")
    assert "262144" in run(clean, tmp_path, "fusewise", "cap", "--version", "0.22", *seed)
    assert "256K" in run(clean, tmp_path, "fusewise", "audit", "--version", "0.22", *seed)
    assert "multimem" in run(clean, tmp_path, "fusewise", "explain", "512K", *seed)
    assert "nvidia-h200-tp8" in run(clean, tmp_path, "fusewise", "profile", "list")
    run(clean, tmp_path, "fusewise", "report", *seed, "--output", "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert "shm.one_shot" in run(clean, tmp_path, "fusewise", "doctor")
    assert "vLLM" in run(clean, tmp_path, "fusewise", "vllm", "check", "--help")
    small = ("--hidden", "64", "--max-bytes", "8K", "--rounds", "5", "--budget", "5s")
    told = json.loads(run(clean, tmp_path, "fusewise", "tune", *small, "--format", "json"))
    assert told
    assert "shm.one_shot" in run(clean, tmp_path, "fusewise", "show")


def test_the_plugins_are_found_by_their_engines(clean: Path, tmp_path: Path) -> None:
    ours = {
        (point.group, point.name): point.value
        for point in importlib.metadata.Distribution.at(
            next(clean.parent.glob("lib/python*/site-packages/fusewise-*.dist-info"))
        ).entry_points
    }
    assert ours[("console_scripts", "fusewise")] == "fusewise.__main__:main"
    for (group, _), value in ours.items():
        module, _, name = value.partition(":")
        code = f"import {module} as m; assert callable(m.{name}), {group!r}"
        run(clean, tmp_path, "python", "-c", code)
