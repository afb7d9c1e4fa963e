"""Our CUDA sources compiled by NVRTC for one architecture, through ``cuda.core``.

Needs neither a GPU nor nvcc; a compiled kernel is kept under a key made of everything that went
into it. Never loads or launches anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fusewise.errors import UnavailableError
from fusewise.node import kernels_digest

if TYPE_CHECKING:
    from fusewise.backends.native.cuda.cubin_cache import CubinCache
    from fusewise.backends.native.instance import Instance

SOURCES = Path(__file__).parent
INSTALL_HINT = 'Install it with: pip install "fusewise[cuda]"'
# Subnormals stay and nothing is approximated that the source does not say: NVRTC's defaults, said.
_FLAGS = {"std": "c++17", "ftz": False, "prec_div": True, "prec_sqrt": True, "fma": True}


def missing_compiler() -> str | None:
    """Why kernels cannot be compiled in this environment; None if they can."""
    try:
        found = all(importlib.util.find_spec(name) for name in ("cuda.core", "cuda.bindings"))
    except ModuleNotFoundError:  # no package named cuda at all
        found = False
    return None if found else f"cuda.core is not installed. {INSTALL_HINT}"


def cubin(instance: Instance, sm: int, cache: CubinCache) -> bytes:
    """The instance's machine code for ``sm`` (90 for sm_90), from the cache or compiled now.

    Raises:
        UnavailableError: cuda.core is missing, or NVRTC refused the source; carries its log.
    """
    key = cubin_key(instance, sm)
    code = cache.get(key)
    if code is None:
        code = compile_instance(instance, sm)
        cache.put(key, code)
    return code


def cubin_key(instance: Instance, sm: int) -> str:
    """SHA-256 over sources, options, architecture and compiler version."""
    parts = [kernels_digest(), repr(instance.defines()), instance.kernel, repr(_FLAGS)]
    parts += [f"sm_{sm}", nvrtc_version()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def compile_instance(
    instance: Instance,
    sm: int,
    extra: str = "",
    log: list[str] | None = None,
    source: Path | None = None,
) -> bytes:
    """Compiles one instance.

    Args:
        instance: which kernel.
        sm: the architecture, 80 for sm_80.
        extra: source appended after the kernel.
        log: receives what the compiler and ptxas say, with register and spill counts.
        source: another file with the instance's kernel in it; its folder is searched first.

    Raises:
        UnavailableError: as ``cubin``.
    """
    reason = missing_compiler()
    if reason:
        raise UnavailableError("the native kernels cannot be compiled", got=reason)
    from cuda.core import Program, ProgramOptions

    source = source or SOURCES / f"{instance.kernel}.cu"
    said = _Log()
    options = ProgramOptions(
        name=source.name,
        arch=f"sm_{sm}",
        include_path=[str(source.parent), str(SOURCES)],
        define_macro=instance.defines(),
        ptxas_options=["-v"] if log is not None else None,
        **_FLAGS,
    )
    try:
        program = Program(source.read_text(encoding="utf-8") + extra, "c++", options)
        code = program.compile("cubin", logs=said).code
    except Exception as error:  # NVRTC's border: the binding has no common base class
        raise UnavailableError(
            f"NVRTC could not compile {source.name} for sm_{sm}",
            got=f"{error} {said.text}".strip()[:2000],
            hint="Upgrade nvidia-cuda-nvrtc, or use --without native.",
        ) from error
    if log is not None:
        log.append(said.text)
    return bytes(code)


class _Log:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


@lru_cache(maxsize=1)
def nvrtc_version() -> str:
    """NVRTC's version as ``13.0``.

    Raises:
        UnavailableError: cuda.bindings is missing.
    """
    if reason := missing_compiler():
        raise UnavailableError("the native kernels cannot be compiled", got=reason)
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"
