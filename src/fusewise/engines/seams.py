"""A place in an engine's sources that a plugin touches: named, and probed before it is used.

A seam is a module, a qualified name in it and, for functions, the parameters it must take. Each
engine's own are in its folder; the tests check them against the sources of its releases. Nothing
here knows an engine or decides anything.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_WRAPPED = "_fusewise_wrapped"


@dataclass(frozen=True)
class Seam:
    """One place in an engine.

    Args:
        what: what we use it for.
        module: where it is defined.
        name: qualified name in the module.
        takes: parameters a function must have, in this order, with any others between.
    """

    what: str
    module: str
    name: str
    takes: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.module}:{self.name} ({self.what})"


def missing(seams: Iterable[Seam]) -> list[str]:
    """One line per seam that this engine does not have, or has with other parameters."""
    return [f"{seam}: {fault}" for seam in seams if (fault := _fault(seam))]


def _fault(seam: Seam) -> str | None:
    try:
        found = resolve(seam)
    except (ImportError, AttributeError) as error:
        return f"not found, {error}"
    if seam.takes is None:
        return None
    return parameters_fault(seam, list(inspect.signature(found).parameters))


def parameters_fault(seam: Seam, parameters: list[str]) -> str | None:
    """None when ``seam.takes`` is a subsequence of ``parameters``."""
    rest = iter(parameters)
    if all(name in rest for name in seam.takes or ()):
        return None
    return f"takes ({', '.join(parameters)})"


def resolve(seam: Seam) -> Any:
    """The object behind a seam; imports its module.

    Raises:
        ImportError, AttributeError: it is not there.
    """
    found: Any = importlib.import_module(seam.module)
    for part in seam.name.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[part] if part in fields else getattr(found, part)
    return found


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replaces ``owner.name`` by ``around(original, *args, **kwargs)``, once.

    A second call for the same place does nothing, so loading the plugin twice is harmless.
    """
    original = getattr(owner, name)
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapper, _WRAPPED, True)
    setattr(owner, name, wrapper)
