"""Seams in an engine's sources as they lie on disk, read without importing them.

For whoever must know before the engine starts: ``fusewise vllm check``, and the tests' record of
every release. Decides nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusewise.engines.seams import Seam, parameters_fault


def moved(seams: Iterable[Seam], folder: Path) -> list[str]:
    """One line per seam that the sources in ``folder`` lack, or have with other parameters."""
    faults = []
    for seam in seams:
        found = signature(folder, seam.module, seam.name)
        if found is None:
            faults.append(f"{seam}: not found")
        elif isinstance(found, list) and (fault := parameters_fault(seam, found)):
            faults.append(f"{seam}: {fault}")
    return faults


def signature(folder: Path, module: str, name: str) -> list[str] | str | None:
    """Parameters of a function, ``"value"`` for anything else of that name, None when absent.

    Args:
        folder: what holds the top package.
        module, name: as in a ``Seam``.
    """
    file = folder / (module.replace(".", "/") + ".py")
    if not file.exists():
        return None
    found: Any = ast.parse(file.read_text("utf-8"))
    for part in name.split("."):
        found = definition(found, part)
        if found is None:
            return None
    if not isinstance(found, ast.FunctionDef):
        return "value"
    return [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]


def definition(tree: ast.AST, name: str) -> ast.AST | None:
    """The first function, class or assignment of that name within ``tree``."""
    return next((node for node in ast.walk(tree) if _defines(node, name)), None)


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return isinstance(node, ast.Assign | ast.AnnAssign) and any(
        isinstance(t, ast.Name) and t.id == name for t in targets
    )
