"""What FlashInfer's all-reduce kernels take, and whether they can be loaded at all.

Read from FlashInfer 0.6.11.post2: ``comm/allreduce.py``, ``comm/trtllm_ar.py``, ``jit/core.py`` and
``trtllm_allreduce_fusion.cuh``. Never imports FlashInfer: that would need a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fusewise.shape import ELEMENT_BYTES

if TYPE_CHECKING:
    from fusewise.node import Fingerprint
    from fusewise.shape import Shape

_CUDA_HOME = "/usr/local/cuda"  # where the toolkit lies when nothing says otherwise
_MIN_VERSION = (0, 6, 11)  # create_allreduce_fusion_workspace takes a process group from here on
WORLD_SIZES = (2, 4, 8, 16)  # allreduce_fusion_op
_VECTOR_BYTES = 16  # kBytesPerAccess
_MAX_CLUSTER = 8  # CTAs that may share one token
_MAX_BLOCK = 1024  # threads
# Workspaces are sized in elements; their row length is free. 1024 keeps every slot 16-byte aligned.
WORKSPACE_ROW = 1024
# The clear offset 2 · lamport_comm_size is an int32 in LamportComm, unlike the data offset.
_MAX_LAMPORT_BYTES = 2**30 - 1


def package_reason(node: Fingerprint, module: str) -> str | None:
    """Why FlashInfer's kernels cannot be loaded here; None if they can.

    Args:
        node: for the installed version.
        module: the name of the kernel module, ``trtllm_comm`` or ``vllm_comm``.
    """
    if node.device_type != "cuda":
        return "needs NVIDIA GPUs; CPU ranks use shm or gloo"
    spec = importlib.util.find_spec("flashinfer")
    if spec is None:
        return "flashinfer is not installed; pip install 'fusewise[flashinfer]'"
    if node.flashinfer and _version(node.flashinfer) < _MIN_VERSION:
        wanted = ".".join(map(str, _MIN_VERSION))
        return f"flashinfer {node.flashinfer} is too old; pip install 'flashinfer-python>={wanted}'"
    prebuilt = Path(spec.origin or "").parent / "data" / "aot" / module / f"{module}.so"
    if not (prebuilt.exists() or importlib.util.find_spec("flashinfer_jit_cache") or _has_nvcc()):
        return (
            f"flashinfer must compile {module} and finds no nvcc; put the CUDA toolkit's bin on"
            " PATH or pip install flashinfer-jit-cache"
        )
    return None


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _has_nvcc() -> bool:
    if os.environ.get("FLASHINFER_NVCC") or shutil.which("nvcc"):
        return True
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _CUDA_HOME]
    return any(home and Path(home, "bin", "nvcc").exists() for home in homes)


def launch_problem(shape: Shape) -> str | None:
    """Why the kernels' launcher takes no rows of this width; None if it does.

    One thread holds 16 bytes and one cluster holds one row, so a row's threads must split into
    1, 2, 4 or 8 CTAs of at most 1024 (sm_90 and newer; ``available`` refuses older ones).
    """
    if shape.row_bytes % _VECTOR_BYTES:
        return f"rows of {shape.row_bytes} bytes are no multiple of {_VECTOR_BYTES}"
    threads = shape.row_bytes // _VECTOR_BYTES
    cluster = _MAX_CLUSTER
    while threads % cluster:
        cluster //= 2
    if threads // cluster > _MAX_BLOCK:
        return f"a row needs {threads // cluster} threads per CTA, at most {_MAX_BLOCK} fit"
    return None


def workspace_elements(shape: Shape, world_size: int) -> int:
    """Elements of one message that a workspace for ``shape`` holds, whole workspace rows."""
    wanted = -(-shape.num_tokens * shape.hidden_size // WORKSPACE_ROW)
    most = _MAX_LAMPORT_BYTES // (world_size * ELEMENT_BYTES[shape.dtype] * WORKSPACE_ROW)
    return min(max(wanted, 1), most) * WORKSPACE_ROW
