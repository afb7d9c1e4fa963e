"""SGLang as an engine: its settings on a node, from its version, its environment and our flags.

Reads the environment variables under SGLang's own names and defaults. Never imports SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from fusewise.engines import base
from fusewise.engines.base import Engine, Flag, FlagValue
from fusewise.engines.sglang.dispatch import FlashInferBackend, SGLangSettings
from fusewise.engines.sglang.tables import TABLES, WORLD_SIZES, known_version
from fusewise.errors import InputError, UnavailableError
from fusewise.node import Fingerprint
from fusewise.shape import DType

BACKENDS: tuple[str, ...] = get_args(FlashInferBackend)
_TRUE, _FALSE = ("true", "1", "yes", "y"), ("false", "0", "no", "n")  # EnvBool, environ.py
_MAX_SIZE = "SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB"
# These lift the tuned sizes of SGLang's own kernels to whatever they say; nobody read what follows.
_FORCED = tuple(f"SGLANG_FORCE_CUSTOM_ALL_REDUCE_V2_{way}_SIZE_KB" for way in ("PULL", "PUSH"))


def settings_on(
    version: str,
    node: Fingerprint,
    dtype: DType,
    environ: Mapping[str, str],
    flags: Mapping[str, FlagValue],
) -> SGLangSettings:
    """What decides this SGLang's all-reduce on this node.

    Args:
        version: of SGLang.
        node: its ``world_size`` is the tensor-parallel size.
        dtype: the model's.
        environ: where SGLang's switches are; each has SGLang's default.
        flags: fields of ``SGLangSettings`` that win over node and ``environ``.

    Raises:
        InputError: the version was not read, or a switch has a value SGLang refuses too.
        UnavailableError: no GPU, a group over several nodes or of a size that FlashInfer does not
            fuse for, or kernels forced to sizes that nobody read.
    """
    if node.sm is None or node.nodes > 1 or node.world_size not in WORLD_SIZES:
        raise UnavailableError(
            "SGLang's fusion is known here for one node",
            expected=f"{', '.join(map(str, WORLD_SIZES))} GPUs of it",
            got=f"{node.world_size} of {node.device}, nodes {node.nodes}",
        )
    forced = [name for name in _FORCED if name in environ]
    if forced:
        raise UnavailableError(f"{forced[0]} moves SGLang's all-reduces beyond its tables")
    settings: dict[str, Any] = {
        "multicast": node.multicast,
        "fully_connected": node.fabric.startswith("nv"),
        "custom_v2": _switch(environ, "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2", default=True),
        "pcie_ipc": _switch(environ, "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE", default=False),
        "custom_max_bytes": _kib(environ, _MAX_SIZE),
    } | dict(flags)
    backend = settings.get("flashinfer_backend", "auto")
    if backend not in BACKENDS:
        raise InputError(
            "--flashinfer-allreduce-fusion-backend",
            expected=" or ".join(BACKENDS),
            got=repr(backend),
        )
    return SGLangSettings(
        version=version, sm=node.sm, world_size=node.world_size, dtype=dtype, **settings
    )


def _switch(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = environ.get(name, str(default)).lower()
    if text not in (*_TRUE, *_FALSE):
        raise InputError(name, expected=" or ".join((*_TRUE, *_FALSE)), got=repr(environ[name]))
    return text in _TRUE


def _kib(environ: Mapping[str, str], name: str) -> int | None:
    """KiB of a variable as bytes; None where it is not set."""
    if name not in environ:
        return None
    try:
        return int(environ[name]) * 2**10
    except ValueError as error:
        raise InputError(name, expected="a whole number", got=repr(environ[name])) from error


ENGINE = Engine(
    name="sglang",
    distribution="sglang",
    versions=tuple(TABLES),
    settings=settings_on,
    stand_in=known_version,
    flags=(
        base.NCCL_SYMM_MEM,
        base.SYMM_MEM,
        base.FLASHINFER_BACKEND,
        Flag(
            "custom_all_reduce",
            "--custom-all-reduce/--no-custom-all-reduce",
            "SGLang: as without or with --disable-custom-all-reduce.",
        ),
        Flag(
            "custom_v2",
            "--custom-v2/--no-custom-v2",
            "SGLang: as with SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2=1 or 0.",
        ),
    ),
)
