"""vLLM as an engine: its settings on a node, from its version, its environment and our flags.

Reads the environment variables under vLLM's own names and defaults. Never imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from fusewise.engines import base
from fusewise.engines.base import Engine, FlagValue
from fusewise.engines.vllm.dispatch import FlashInferBackend, VllmSettings
from fusewise.engines.vllm.tables import TABLES, Tables, known_version
from fusewise.errors import InputError, UnavailableError
from fusewise.node import Fingerprint
from fusewise.shape import DType

BACKENDS: tuple[str, ...] = get_args(FlashInferBackend)
_PLAIN = "VLLM_ALLREDUCE_USE_FLASHINFER"


def settings_on(
    version: str,
    node: Fingerprint,
    dtype: DType,
    environ: Mapping[str, str],
    flags: Mapping[str, FlagValue],
) -> VllmSettings:
    """What decides this vLLM's all-reduce on this node.

    Args:
        version: of vLLM.
        node: its ``world_size`` is the tensor-parallel size.
        dtype: the model's.
        environ: where vLLM's switches are; each has vLLM's default.
        flags: fields of ``VllmSettings`` that win over node and ``environ``;
            ``custom_all_reduce`` is False with ``--disable-custom-all-reduce``.

    Raises:
        InputError: the version was not read, or a switch has a value vLLM refuses too.
        UnavailableError: no GPU, or a group over several nodes: vLLM does not fuse there.
    """
    if node.sm is None or node.nodes > 1:
        raise UnavailableError(
            "vLLM's fusion needs the GPUs of one node", got=f"{node.device}, nodes {node.nodes}"
        )
    invariant = _switch(environ, "VLLM_BATCH_INVARIANT", default=False)
    settings: dict[str, Any] = {
        "nccl_symm_mem": _switch(environ, "VLLM_USE_NCCL_SYMM_MEM", default=False)
        and not invariant,
        "symm_mem": _switch(environ, "VLLM_ALLREDUCE_USE_SYMM_MEM", default=True) and not invariant,
        "fully_connected": node.fabric.startswith("nv"),
        "multicast": node.multicast,
        "flashinfer_backend": environ.get("VLLM_FLASHINFER_ALLREDUCE_BACKEND", "auto"),
        "batch_invariant": invariant,
        "pcie_ipc": _switch(environ, f"{_PLAIN}_PCIE_IPC", default=False) and not invariant,
    }
    if _PLAIN in environ:
        settings["flashinfer_all_reduce"] = _switch(environ, _PLAIN, default=False)
    settings |= flags
    if settings["flashinfer_backend"] not in BACKENDS:
        raise InputError(
            "VLLM_FLASHINFER_ALLREDUCE_BACKEND",
            expected=" or ".join(BACKENDS),
            got=repr(settings["flashinfer_backend"]),
        )
    return VllmSettings(
        version=version, sm=node.sm, world_size=node.world_size, dtype=dtype, **settings
    )


def plain_flashinfer_is_on(tables: Tables, environ: Mapping[str, str]) -> bool:
    """Whether this vLLM asks FlashInfer's plain all-reduce, which reads the fusion table.

    Raises:
        InputError: the switch has a value vLLM refuses too.
    """
    return _switch(environ, _PLAIN, default=tables.flashinfer_default)


def _switch(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    """``bool(int(...))``, as vllm/envs.py reads it."""
    text = environ.get(name, str(int(default)))
    try:
        return bool(int(text))
    except ValueError as error:
        raise InputError(name, expected="0 or 1", got=repr(text)) from error


ENGINE = Engine(
    name="vllm",
    distribution="vllm",
    versions=tuple(TABLES),
    settings=settings_on,
    stand_in=known_version,
    flags=(base.NCCL_SYMM_MEM, base.SYMM_MEM, base.FLASHINFER_BACKEND),
)
