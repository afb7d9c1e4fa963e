"""Every backend by its id. A provider's file is imported only when one of its own is asked for.

Imports no torch by itself, so that names can be checked before any rank starts.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from fusewise.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fusewise.backends.base import Backend
    from fusewise.node import Kind

# Per kind of place: id → file and class. The first of each is the baseline: torch's own choice.
_CUDA = {
    "nccl": "torch_dist:Nccl",
    "nccl_symm": "nccl_symm:NcclSymm",
    "symm_mem.one_shot": "symm_mem:OneShot",
    "symm_mem.two_shot": "symm_mem:TwoShot",
    "multimem": "symm_mem:Multimem",
    "custom": "custom:Custom",
    "flashinfer.one_shot": "flashinfer:OneShot",
    "flashinfer.two_shot": "flashinfer:TwoShot",
    "flashinfer.mnnvl": "flashinfer_mnnvl:Mnnvl",
    "native.one_shot": "native.strategies:OneShot",
    "native.two_shot": "native.strategies:TwoShot",
}
_CPU = {
    "gloo": "torch_dist:Gloo",
    "shm.one_shot": "shm:OneShot",
}
_SHARED = {"gloo": _CPU["gloo"]} | _CUDA  # NCCL takes one rank per GPU
_HOMES = _CUDA | _CPU
_PLACES: dict[Kind, dict[str, str]] = {"cuda": _CUDA, "shared": _SHARED, "cpu": _CPU}


def all_ids() -> list[str]:
    """Every backend id."""
    return list(_HOMES)


def backend_class(backend_id: str) -> type[Backend]:
    """The class behind an id.

    Raises:
        InputError: no such backend; names those that look alike.
    """
    if backend_id not in _HOMES:
        close = difflib.get_close_matches(backend_id, _HOMES, n=2)
        raise InputError(
            "unknown backend",
            expected=f"one of {', '.join(_HOMES)}",
            got=repr(backend_id),
            hint=f"Did you mean {' or '.join(close)}?" if close else None,
        )
    module, name = _HOMES[backend_id].split(":")
    found: type[Backend] = getattr(importlib.import_module(f"fusewise.backends.{module}"), name)
    return found


def select(names: Iterable[str]) -> set[str]:
    """Ids for names as people write them: an id, or a provider such as ``native`` for all of its.

    Raises:
        InputError: a name that is neither.
    """
    chosen: set[str] = set()
    for name in names:
        family = {i for i in _HOMES if i == name or i.startswith(f"{name}.")}
        chosen |= family or {backend_class(name).id}
    return chosen


def ids_for(kind: Kind) -> list[str]:
    """Ids of the backends made for that kind of place, the baseline first."""
    return list(_PLACES[kind])


def baseline_id(kind: Kind) -> str:
    """What torch itself would run: ``nccl`` on GPUs, ``gloo`` on CPUs and on shared GPUs."""
    return ids_for(kind)[0]


def baselines() -> set[str]:
    """Every place's baseline."""
    return {baseline_id(kind) for kind in _PLACES}
