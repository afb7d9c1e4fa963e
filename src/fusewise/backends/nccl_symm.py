"""NCCL's all-reduce on a buffer registered as a symmetric window (NCCL 2.27 and later).

torch exposes the windows through ``ProcessGroupNCCL.register_mem_pool(pool, symm=True)``, probed
and not assumed; NCCL then picks its symmetric kernels by itself. The pool is filled before it is
registered: newer torch no longer registers what is allocated afterwards. The message is copied
into the buffer and the sum out of it, as in an engine that cannot allocate every activation there.

Whether NCCL uses NVLink multicast is NCCL's decision under NCCL_NVLS_ENABLE, which this file
neither sets nor reads.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fusewise.backends.base import Backend
from fusewise.backends.steps import not_on_one_host, together
from fusewise.errors import UnavailableError
from fusewise.profiles.schema import Numerics

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

_MIN_NCCL = (2, 27)  # ncclCommWindowRegister
_SWITCHES = ("NCCL_WIN_ENABLE", "NCCL_CUMEM_ENABLE")  # 0 turns windows, or what they need, off


class NcclSymm(Backend):
    """NCCL over symmetric memory: copy in, all-reduce in place, copy out."""

    id = "nccl_symm"
    provider = "nccl_symm"
    # NCCL's symmetric kernels accumulate in fp32; which of them runs is NCCL's choice by size.
    numerics = Numerics(accumulation="float32", order="algorithm", rounds_sum=True)

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        if node.device_type != "cuda":
            return "needs NVIDIA GPUs; CPU ranks use shm or gloo"
        apart = not_on_one_host(node.nodes, node.world_size)
        if node.kind == "shared":
            return "NCCL takes one rank per GPU, and several share this one"
        if apart is None and not node.fabric.startswith("nv"):
            apart = f"NCCL's symmetric kernels need NVLink between all ranks, not {node.fabric}"
        return apart or _torch_reason() or _nccl_reason(node)

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        self._bytes = max(max_shape.message_bytes, 1)
        self._registered = False
        self._buffer: Tensor | None = None
        self._backend: Any = together(group, "nccl_symm: process group", self._nccl)
        together(group, "nccl_symm: communicator", self._warm_up)
        try:
            together(group, "nccl_symm: allocate", self._allocate)
            together(group, "nccl_symm: register windows", self._register)
        except UnavailableError:
            self._release()
            raise

    def _nccl(self) -> Any:
        backend = str(dist.get_backend(self.group.process_group))
        if "nccl" not in backend:
            raise UnavailableError(
                "needs a process group with the nccl backend",
                got=backend,
                hint="Start it with init_process_group(backend='nccl').",
            )
        return self.group.process_group._get_backend(self.group.device)

    def _warm_up(self) -> None:
        """Makes NCCL's communicator exist: windows are registered with it."""
        dist.all_reduce(torch.zeros(1, device=self.group.device), group=self.group.process_group)
        torch.cuda.synchronize(self.group.device)

    def _allocate(self) -> None:
        self._pool: Any = torch.cuda.MemPool(self._backend.mem_allocator)
        with torch.cuda.use_mem_pool(self._pool, self.group.device):
            self._buffer = torch.empty(self._bytes, dtype=torch.uint8, device=self.group.device)

    def _register(self) -> None:
        self._backend.register_mem_pool(self._pool, symm=True)
        self._registered = True

    def admits(self, shape: Shape) -> str | None:
        return "there is nothing to reduce" if shape.num_tokens == 0 else super().admits(shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._buffer is None:
            raise UnavailableError(f"nccl_symm of {self.group} is closed")
        view = self._buffer[: x.numel() * x.element_size()].view(x.dtype).view(x.shape).copy_(x)
        dist.all_reduce(view, group=self.group.process_group)
        return view.clone()

    def close(self) -> None:
        if self._buffer is None:
            return
        torch.cuda.synchronize(self.group.device)
        self.group.barrier("nccl_symm: close")
        self._release()

    def _release(self) -> None:
        if self._registered:
            self._backend.deregister_mem_pool(self._pool)
        self._registered = False
        self._buffer = None
        self._pool = None


def _torch_reason() -> str | None:
    kind: Any = getattr(dist, "ProcessGroupNCCL", None) if dist.is_nccl_available() else None
    if kind is None:
        return "this torch was built without NCCL; install a CUDA build of torch"
    # pybind11 writes the parameters into the docstring; inspect.signature cannot read them.
    if "symm" not in (kind.register_mem_pool.__doc__ or ""):
        return "this torch cannot register symmetric windows; upgrade to torch 2.11 or later"
    return None


def _nccl_reason(node: Fingerprint) -> str | None:
    if node.nccl and _version(node.nccl) < _MIN_NCCL:
        return f"NCCL {node.nccl} has no symmetric windows; install 2.27 or later"
    for switch in _SWITCHES:
        if os.environ.get(switch) == "0":
            return f"{switch}=0 turns NCCL's symmetric windows off; unset it"
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
