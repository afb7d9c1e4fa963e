"""Virtual ranks: every rank of a group in one cooperative grid on one GPU, with random delays.

The kernels are ``*_virtual.cu`` beside this file, which wrap the shipped device code.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewise.backends.native.cuda.build import compile_instance
from fusewise.backends.native.cuda.launch import Kernels

if TYPE_CHECKING:
    from fusewise.backends.native.instance import Instance


class VirtualParams(ctypes.Structure):
    """The virtual kernels' only parameter: the ranks' parameters, an array in device memory."""

    _fields_ = [("ranks", ctypes.c_uint64)]


class VirtualKernels(Kernels):
    """The instances of the virtual kernels; blockIdx.y is the rank."""

    def machine_code(self, instance: Instance) -> bytes:
        return _code_once(instance, self.sm)


def compile_all(instances: set[Instance], sm: int) -> None:
    """Side by side, so that a test over many shapes does not wait for one after the other."""
    import cuda.core  # noqa: F401  once, before threads do

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(_code_once, sm=sm), instances))


@cache
def _code_once(instance: Instance, sm: int) -> bytes:
    return virtual_code(instance, sm)


def virtual_code(instance: Instance, sm: int, log: list[str] | None = None) -> bytes:
    source = Path(__file__).with_name(f"{instance.kernel}_virtual.cu")
    return compile_instance(instance, sm, log=log, source=source)


def layout_checks(structure: type[Any]) -> list[str]:
    """C++ assertions that a structure has the compiler's size and offsets."""
    name = structure.__name__
    checks = [f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});"]
    for field in structure._fields_:
        offset = getattr(structure, field[0]).offset
        place = f"__INTADDR__(&((({name}*)0)->{field[0]}))"  # how NVRTC spells offsetof
        checks.append(f"static_assert(({place}) == {offset});")
    return checks
