"""One vLLM on this node as ``VllmSettings``: from its version, the environment and a fingerprint.

Reads the environment variables under vLLM's own names and defaults. Never imports vLLM, and never
touches the driver in the calling process: vLLM forks its workers, and a process whose parent has
initialised CUDA cannot use it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, cast

from fusewise.engines.vllm.dispatch import FlashInferBackend, VllmSettings
from fusewise.errors import InputError, UnavailableError
from fusewise.node import Fingerprint
from fusewise.shape import DType

# Fewer GPUs here than ranks: the group spans nodes.
_PROBE = """
import sys
from fusewise.node import gpu_count, probe
ranks, gpus = int(sys.argv[1]), gpu_count()
print(probe(ranks, nodes=-(-ranks // gpus) if gpus else 1).model_dump_json())
"""
_PROBE_TIMEOUT_S = 60.0  # a cold driver takes a few seconds


@functools.lru_cache(maxsize=8)
def probe_apart(world_size: int) -> Fingerprint:
    """The node's fingerprint, probed in a process of its own.

    Raises:
        UnavailableError: the probe failed or did not end within a minute.
    """
    command = [sys.executable, "-c", _PROBE, str(world_size)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise UnavailableError("the node could not be probed", got=str(error)) from error
    return Fingerprint.model_validate_json(done.stdout)


def settings_here(
    version: str,
    node: Fingerprint,
    dtype: DType,
    environ: Mapping[str, str],
    *,
    custom_all_reduce: bool = True,
) -> VllmSettings:
    """What decides this vLLM's all-reduce on this node.

    Args:
        version: of vLLM.
        node: its ``world_size`` is the tensor-parallel size.
        dtype: the model's.
        environ: where vLLM's switches are; each has vLLM's default.
        custom_all_reduce: False with ``--disable-custom-all-reduce``.

    Raises:
        InputError: the version was not read, or a switch has a value vLLM refuses too.
        UnavailableError: no GPU, or a group over several nodes: vLLM does not fuse there.
    """
    if node.sm is None or node.nodes > 1:
        raise UnavailableError(
            "vLLM's fusion needs the GPUs of one node", got=f"{node.device}, nodes {node.nodes}"
        )
    invariant = _switch(environ, "VLLM_BATCH_INVARIANT", default=False)
    plain = environ.get("VLLM_ALLREDUCE_USE_FLASHINFER")
    backend = environ.get("VLLM_FLASHINFER_ALLREDUCE_BACKEND", "auto")
    if backend not in ("auto", "trtllm", "mnnvl"):
        raise InputError(
            "VLLM_FLASHINFER_ALLREDUCE_BACKEND", expected="auto, trtllm or mnnvl", got=repr(backend)
        )
    changes: dict[str, Any] = {}
    if plain is not None:
        flag = _switch(environ, "VLLM_ALLREDUCE_USE_FLASHINFER", default=False)
        changes["flashinfer_all_reduce"] = flag
    return VllmSettings(
        version=version,
        sm=node.sm,
        world_size=node.world_size,
        multicast=node.multicast,
        dtype=dtype,
        nccl_symm_mem=_switch(environ, "VLLM_USE_NCCL_SYMM_MEM", default=False) and not invariant,
        symm_mem=_switch(environ, "VLLM_ALLREDUCE_USE_SYMM_MEM", default=True) and not invariant,
        flashinfer_backend=cast("FlashInferBackend", backend),
        custom_all_reduce=custom_all_reduce,
        fully_connected=node.fabric.startswith("nv"),
        **changes,
    )


def _switch(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    """``bool(int(...))``, as vllm/envs.py reads it."""
    text = environ.get(name, str(int(default)))
    try:
        return bool(int(text))
    except ValueError as error:
        raise InputError(name, expected="0 or 1", got=repr(text)) from error
