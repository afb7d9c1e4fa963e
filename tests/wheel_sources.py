"""Fetches engines' wheels with pip and reads facts in their Python sources, importing none of them.

A wheel is some hundred MB, of which the sources kept under .cache are a tenth; it is removed once
unpacked. Released wheels do not change, so what was unpacked once stays. What to read in one is
``vllm_sources.py``'s and ``sglang_sources.py``'s business.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusewise.engines.on_disk import definition

CACHE = Path(__file__).resolve().parents[1] / ".cache"
DOWNLOAD_TIMEOUT_S = 600


@dataclass(frozen=True)
class Wheels:
    """One distribution's releases, unpacked under ``folder``, one a version."""

    distribution: str
    folder: Path

    def unpacked(self, version: str) -> Path | None:
        """The folder that holds a version's package, or None when it was not fetched."""
        folder = self.folder / version
        return folder if (folder / ".complete").exists() else None

    def fetch(self, version: str) -> None:
        """Downloads one wheel with pip and unpacks its Python files."""
        if self.unpacked(version):
            return
        folder = self.folder / version
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--no-cache-dir", "--only-binary", ":all:"]
            command += ["--retries", "1", "--dest", scratch, f"{self.distribution}=={version}"]
            subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                kept = (".py", "dist-info/METADATA")
                archive.extractall(folder, [n for n in archive.namelist() if n.endswith(kept)])
        (folder / ".complete").touch()

    def fetch_all(self, *versions: str) -> None:
        """Every one of them; one that cannot be fetched is named, and its tests will skip."""
        for version in versions:
            try:
                self.fetch(version)
            except (subprocess.SubprocessError, OSError) as error:
                name = f"{self.distribution} {version}"
                print(f"{name} could not be fetched, its tests will be skipped: {error}")


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """One line per value that differs between two releases' facts."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        inner = (differences(old.get(k), new.get(k), f"{place}.{k}".lstrip(".")) for k in keys)
        return [line for lines in inner for line in lines]
    return [] if old == new else [f"{place}: {old} -> {new}"]


def write(file: Path, record: dict[str, Any]) -> None:
    """A record's file, a release a line."""
    lines = [f' "{version}": {json.dumps(entry)}' for version, entry in record.items()]
    file.parent.mkdir(exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def table(file: Path, name: str) -> Any:
    """A table's value with its keys as text, as JSON keeps them; None when absent."""
    tree = ast.parse(file.read_text("utf-8"))
    node: Any = definition(tree, name)
    if node is None:
        return None
    sizes = {"KiB": 2**10, "MiB": 2**20}
    return plain(eval(compile(ast.Expression(node.value), str(file), "eval"), sizes))


def plain(value: Any) -> Any:
    """As JSON gives it back: keys as text, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def calls(file: Path, name: str) -> list[list[str]]:
    """Keyword names of every call of ``name``, positional arguments as ``*``."""
    found = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)]
    named = [c for c in found if ast.unparse(c.func) == name]
    return [["*"] * len(c.args) + [str(k.arg) for k in c.keywords] for c in named]
