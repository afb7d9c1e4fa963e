"""Every engine by its name. Imports no torch and no engine's own package.

A line names the module whose ``ENGINE`` is a ``base.Engine``; the first is what commands assume.
"""

from __future__ import annotations

import importlib

from fusewise.engines.base import Engine, Flag
from fusewise.errors import InputError

_ENGINES = {
    "vllm": "fusewise.engines.vllm.engine",
    "sglang": "fusewise.engines.sglang.engine",
}


def names() -> list[str]:
    """Every engine's name, the default first."""
    return list(_ENGINES)


def engine_named(name: str | None = None) -> Engine:
    """The engine of that name; without one, the default.

    Raises:
        InputError: no such engine; names those there are.
    """
    name = names()[0] if name is None else name
    if name not in _ENGINES:
        raise InputError("unknown engine", expected=" or ".join(_ENGINES), got=repr(name))
    engine: Engine = importlib.import_module(_ENGINES[name]).ENGINE
    return engine


def flags() -> dict[str, Flag]:
    """The options of all engines by name; engines that share a name share its declaration."""
    return {flag.name: flag for name in names() for flag in engine_named(name).flags}
