"""FlashInfer's fused all-reduce + residual + RMSNorm, backend ``trtllm``, one-shot and two-shot.

One workspace per strategy, so that the state of one never meets the other. The limits below are
read from FlashInfer 0.6.11.post2: ``comm/trtllm_ar.py`` and ``trtllm_allreduce_fusion.cuh``.

Known behaviour, left to verification on the node:

- One-shot marks an empty slot with -0.0 and turns -0.0 inputs into +0.0.
- ``trigger_completion_at_end`` stays True: released early, a dependent kernel can read outputs
  that are not written yet (NaN at few tokens).
- Under programmatic dependent launch the kernels load ``residual`` before they wait for the
  kernel ahead of them. A kernel ahead that triggers early and writes ``residual`` last races.

Never the backends ``mnnvl`` or ``auto``.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fusewise.backends.base import Backend
from fusewise.backends.steps import not_on_one_host, together
from fusewise.errors import InputError, UnavailableError
from fusewise.profile import Numerics
from fusewise.shape import ELEMENT_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.group import Group
    from fusewise.node import Fingerprint
    from fusewise.shape import Shape

_CUDA_HOME = "/usr/local/cuda"  # where the toolkit lies when nothing says otherwise
_MIN_VERSION = (0, 6, 11)  # create_allreduce_fusion_workspace takes a process group from here on
_WORLD_SIZES = (2, 4, 8, 16)  # allreduce_fusion_op
_VECTOR_BYTES = 16  # kBytesPerAccess
_MAX_CLUSTER = 8  # CTAs that may share one token
_MAX_BLOCK = 1024  # threads
# Workspaces are sized in elements; their row length is free. 1024 keeps every slot 16-byte aligned.
_WORKSPACE_ROW = 1024
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
    wanted = -(-shape.num_tokens * shape.hidden_size // _WORKSPACE_ROW)
    most = _MAX_LAMPORT_BYTES // (world_size * ELEMENT_BYTES[shape.dtype] * _WORKSPACE_ROW)
    return min(max(wanted, 1), most) * _WORKSPACE_ROW


class _FlashInfer(Backend):
    provider = "flashinfer"
    fused = True
    # allreduce_sum: fp32 in rank order with fp32_acc, then rounded before the residual is added.
    numerics = Numerics(accumulation="float32", order="rank", rounds_sum=True)
    takes_no_residual = False
    takes_weight_bias = False
    one_shot: ClassVar[bool]

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        reason = package_reason(node, "trtllm_comm") or not_on_one_host(node.nodes, node.world_size)
        if reason:
            return reason
        if (node.sm or 0) // 10 not in (9, 10):
            return f"its kernels are built for sm_90 and sm_100, this is sm_{node.sm}; use nccl"
        if node.world_size not in _WORLD_SIZES:
            return f"takes {_WORLD_SIZES} ranks, not {node.world_size}; use nccl"
        return None

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        self._elements = workspace_elements(max_shape, group.world_size)
        self._workspace: Any = None
        self._comm = together(group, f"{self.id}: load kernels", _load)
        group.agree(f"{self.id}: workspace size", [self._elements, max_shape.dtype])
        try:
            together(group, f"{self.id}: workspace", self._make_workspace)
        except UnavailableError:
            self._release()
            raise
        parameters = inspect.signature(self._comm.allreduce_fusion).parameters
        self.takes_weight_bias = "weight_bias" in parameters

    def _make_workspace(self) -> None:
        rows = self._elements // _WORKSPACE_ROW
        # Two-shot stages input and sum: 2 · message bytes in a buffer of world_size · elements ·
        # 2 bytes, whatever the dtype. Two ranks in fp32 need twice the rows for that.
        message_bytes = self._elements * ELEMENT_BYTES[self.max_shape.dtype]
        staged = -(-message_bytes // (self.group.world_size * _WORKSPACE_ROW))
        with torch.cuda.device(self.group.device):
            self._workspace = self._comm.create_allreduce_fusion_workspace(
                backend="trtllm",
                world_size=self.group.world_size,
                rank=self.group.rank,
                max_token_num=rows if self.one_shot else max(rows, staged),
                hidden_dim=_WORKSPACE_ROW,
                dtype=getattr(torch, self.max_shape.dtype),
                group=self.group.process_group,
            )

    def admits(self, shape: Shape) -> str | None:
        if self._workspace is None:
            return "it is closed"
        if shape.num_tokens == 0:
            return "there is no row to reduce"
        # Empty slots hold -0.0 of the workspace's word size; 32-bit words do not read 16-bit ones.
        if (shape.dtype == "float32") != (self.max_shape.dtype == "float32"):
            return f"its workspace was initialised for {self.max_shape.dtype}"
        if not self.one_shot and shape.num_tokens <= self.group.world_size:
            return f"two-shot needs more than {self.group.world_size} tokens"
        elements = shape.num_tokens * shape.hidden_size
        if elements > self._elements:
            element_bytes = ELEMENT_BYTES[shape.dtype]
            return (
                f"needs {elements * element_bytes} bytes of workspace, has "
                f"{self._elements * element_bytes}"
            )
        return launch_problem(shape) or self._provider_refusal(shape)

    def _provider_refusal(self, shape: Shape) -> str | None:
        fits = self._workspace.is_buffer_size_sufficient(
            self.group.world_size,
            shape.num_tokens,
            shape.hidden_size,
            getattr(torch, shape.dtype),
            self.one_shot,
        )
        return None if fits else f"flashinfer says its workspace is too small for {shape}"

    def _fuse(self, x: Tensor, pattern: int, **tensors: Any) -> None:
        if self._workspace is None:
            raise UnavailableError(f"{self.id} of {self.group} is closed")
        self._comm.allreduce_fusion(
            input=x,
            workspace=self._workspace,
            pattern=pattern,
            launch_with_pdl=True,
            trigger_completion_at_end=True,
            use_oneshot=self.one_shot,
            fp32_acc=True,
            **tensors,
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._fuse(x, self._comm.AllReduceFusionPattern.kAllReduce, output=out)
        return out

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        if residual is None or (weight_bias and not self.takes_weight_bias):
            raise InputError(
                f"{self.id} cannot run this call",
                expected="a residual and no weight bias",
                hint="Call it through Communicator, which picks a path that can.",
            )
        norm, total = torch.empty_like(x), torch.empty_like(x)
        bias = {"weight_bias": weight_bias} if weight_bias else {}
        self._fuse(
            x,
            self._comm.AllReduceFusionPattern.kARResidualRMSNorm,
            residual_in=residual,
            residual_out=total,
            norm_out=norm,
            rms_gamma=weight,
            rms_eps=eps,
            **bias,
        )
        return norm, total

    def close(self) -> None:
        if self._workspace is None:
            return
        torch.cuda.synchronize(self.group.device)
        self.group.barrier(f"{self.id}: close")  # a peer's late store must still find the memory
        self._release()

    def _release(self) -> None:
        workspace, self._workspace = self._workspace, None
        if workspace is not None:
            # destroy() alone leaves the buffers in a table of FlashInfer's, keyed by this list.
            self._comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace.ipc_handles)
            workspace.destroy()


def _load() -> Any:
    """Imports FlashInfer and compiles or loads its kernels: what can fail on one rank alone."""
    from flashinfer import comm
    from flashinfer.comm.trtllm_ar import get_trtllm_comm_module

    get_trtllm_comm_module()
    return comm


class OneShot(_FlashInfer):
    """Every rank pushes its rows to all peers, which sum, add and normalise as rows arrive."""

    id = "flashinfer.one_shot"
    one_shot = True


class TwoShot(_FlashInfer):
    """Each rank sums the rows it owns and stores them to all peers; two barriers between."""

    id = "flashinfer.two_shot"
    one_shot = False
