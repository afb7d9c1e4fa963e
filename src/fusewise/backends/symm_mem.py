"""torch's own kernels over symmetric memory: one-shot, two-shot and multimem all-reduce.

All three read peers' copies of one symmetric buffer, so the message is copied into it first, and
two-shot and multimem reduce in place and copy out, as vLLM runs them. The copies are part of the
path. ``one_shot_all_reduce_copy`` would save one, but signals the peers from a block's first warp
without waiting for the block's other warps to have stored their share; it is not used.

Ordering (torch's CUDASymmetricMemoryOps.cu): each kernel ends in a barrier of all ranks that comes
after its last access to a peer's buffer. So when it returns, no peer still reads
or writes this rank's buffer and the next call may overwrite it, whatever its size. Calls must come
from one stream per group: they share one set of signal pads.

This file never turns multicast on or off; torch honours TORCH_SYMM_MEM_DISABLE_MULTICAST itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from fusewise.backends.base import Backend
from fusewise.backends.steps import PTRACE_HINT, not_on_one_host, rendezvous, together
from fusewise.errors import UnavailableError
from fusewise.profiles.schema import Numerics

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

_VECTOR_BYTES = 16  # the widest access of torch's kernels; narrower sizes run other code
_DTYPES = ("bfloat16", "float32")  # AT_DISPATCH_FLOAT_AND_BFLOAT16 in CUDASymmetricMemoryOps.cu


class _SymmMem(Backend):
    provider = "symm_mem"
    # add_vec adds bf16 pairs with __hadd2, in rank order (CUDASymmetricMemory-inl.h).
    numerics = Numerics(accumulation="input", order="rank", rounds_sum=True)

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        if node.device_type != "cuda":
            return "needs NVIDIA GPUs; CPU ranks use shm or gloo"
        if (node.sm or 0) < 80:
            return f"bf16 sums need sm_80 or newer, this is sm_{node.sm}; use nccl"
        chosen = os.environ.get("TORCH_SYMMMEM", "CUDA")
        if chosen.upper() != "CUDA":
            return f"these kernels need torch's CUDA symmetric memory; unset TORCH_SYMMMEM={chosen}"
        return not_on_one_host(node.nodes, node.world_size)

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        self._bytes = -(-max(max_shape.message_bytes, 1) // _VECTOR_BYTES) * _VECTOR_BYTES
        buffer = together(group, f"{self.id}: allocate", self._allocate)
        self._handle: Any = together(
            group, f"{self.id}: rendezvous", lambda: rendezvous(buffer, group), hint=PTRACE_HINT
        )
        self._buffer: Tensor | None = buffer

    def _allocate(self) -> Tensor:
        from torch.distributed import _symmetric_memory

        return _symmetric_memory.empty(self._bytes, dtype=torch.uint8, device=self.group.device)

    def admits(self, shape: Shape) -> str | None:
        if shape.dtype not in _DTYPES:
            return f"torch has this kernel for {' and '.join(_DTYPES)} only"
        if shape.message_bytes == 0 or shape.message_bytes % _VECTOR_BYTES:
            return f"{shape.message_bytes} bytes are no multiple of {_VECTOR_BYTES}"
        return super().admits(shape)

    def _view(self, x: Tensor) -> Tensor:
        """The front of the symmetric buffer with the dtype and shape of ``x``."""
        if self._buffer is None:
            raise UnavailableError(f"{self.id} of {self.group} is closed")
        return self._buffer[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)

    def close(self) -> None:
        if self._buffer is None:
            return
        torch.cuda.synchronize(self.group.device)
        # A peer keeps its own mapping of this memory, so dropping ours cannot pull it away.
        self._handle = None
        self._buffer = None


class OneShot(_SymmMem):
    """Every rank reads all messages and sums them itself."""

    id = "symm_mem.one_shot"

    def all_reduce(self, x: Tensor) -> Tensor:
        view = self._view(x).copy_(x)
        out: Tensor = torch.ops.symm_mem.one_shot_all_reduce(view, "sum", self.group.name)
        return out


class TwoShot(_SymmMem):
    """Each rank sums its share of the message and stores the sum into every peer's buffer."""

    id = "symm_mem.two_shot"

    def all_reduce(self, x: Tensor) -> Tensor:
        view = self._view(x).copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(view, "sum", self.group.name)
        return view.clone()


class Multimem(_SymmMem):
    """The NVSwitch sums: multimem.ld_reduce of a share, multimem.st to all."""

    id = "multimem"
    provider = "multimem"
    # multimem.ld_reduce .acc::f32 adds in the switch, in an order of its own.
    numerics = Numerics(accumulation="float32", order="algorithm", rounds_sum=True)

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        reason = super().available(node)
        if reason is None and (node.sm or 0) < 90:
            return f"multimem needs sm_90 or newer, this is sm_{node.sm}; use nccl"
        if reason is None and not node.multicast:
            return (
                "NVLink multicast is absent or switched off here (TORCH_SYMM_MEM_DISABLE_MULTICAST,"
                " NCCL_NVLS_ENABLE=0); it needs NVSwitch GPUs and a running fabric manager"
            )
        return reason

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        try:
            together(group, f"{self.id}: multicast", self._check_multicast)
        except UnavailableError:
            self.close()
            raise

    def _check_multicast(self) -> None:
        if not self._handle.multicast_ptr:
            raise UnavailableError("torch bound no multicast address to the symmetric buffer")

    def all_reduce(self, x: Tensor) -> Tensor:
        view = self._view(x).copy_(x)
        torch.ops.symm_mem.multimem_all_reduce_(view, "sum", self.group.name)
        return view.clone()
