"""Stand-ins for the GPU providers' Python APIs, for tests without a GPU.

Parameter lists are those of FlashInfer 0.6.11.post2 (``comm/allreduce.py``, ``comm/trtllm_ar.py``,
``comm/vllm_ar.py``, ``comm/cuda_ipc.py``), so that a call which does not bind there does not bind
here; ``test_backend_flashinfer.py`` compares them with an installed FlashInfer where there is one.
All ranks of a fake group hold equal tensors: the sum is world_size times the input.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import sys
import types
from typing import Any

import torch

WORLD = 2
VERSION = "0.6.11.post2"


class Workspace:
    """Answers like TRTLLMAllReduceFusionWorkspace, whose check counts elements only."""

    def __init__(self, **made: Any) -> None:
        self.made, self.ipc_handles, self.destroyed = made, [[1, 2]], False

    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: Any, use_oneshot: Any = None
    ) -> bool:
        made = self.made
        fits = num_tokens * hidden_dim <= made["max_token_num"] * made["hidden_dim"]
        same_word = (dtype == torch.float32) == (made["dtype"] == torch.float32)
        return bool(tp_size == made["world_size"] and fits and same_word)

    def destroy(self) -> None:
        self.destroyed = True


class MnnvlWorkspace(Workspace):
    """Answers like MNNVLAllReduceFusionWorkspace, which chooses a strategy by size."""

    mc_ptr = 0x7000

    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: Any, strategy: Any = "auto"
    ) -> bool:
        assert strategy == "auto", "an Enum there, and no flag"
        made = self.made
        room = self._needed(tp_size, made["max_token_num"], made["hidden_dim"], made["dtype"])
        return self._needed(tp_size, num_tokens, hidden_dim, dtype) <= max(2**20, room)

    @staticmethod
    def _needed(tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype) -> int:
        over_all = num_tokens * hidden_dim * tp_size * dtype.itemsize
        if over_all <= 2**20:
            return over_all
        return int(2 * -(-num_tokens // tp_size) * tp_size * hidden_dim * dtype.itemsize)


class FakeComm(types.ModuleType):
    """``flashinfer.comm``: the fused API."""

    def __init__(self) -> None:
        super().__init__("flashinfer.comm")
        self.calls: list[dict[str, Any]] = []
        self.released: list[Any] = []
        self.AllReduceFusionPattern = types.SimpleNamespace(kAllReduce=0, kARResidualRMSNorm=1)

    def create_allreduce_fusion_workspace(
        self, backend: str = "auto", world_size: Any = None, rank: Any = None,
        max_token_num: Any = None, hidden_dim: Any = None, dtype: Any = None,
        gpus_per_node: Any = None, comm_backend: Any = None, force_oneshot_support: bool = False,
        group: Any = None,
    ) -> Workspace:  # fmt: skip
        assert backend in ("trtllm", "mnnvl")
        kind = Workspace if backend == "trtllm" else MnnvlWorkspace
        assert (comm_backend is None) == (backend == "trtllm"), "without one, mnnvl asks MPI"
        return kind(
            world_size=world_size, rank=rank, max_token_num=max_token_num,
            hidden_dim=hidden_dim, dtype=dtype, group=group or comm_backend.group,
        )  # fmt: skip

    def allreduce_fusion(
        self, input: torch.Tensor, workspace: Any, pattern: int, launch_with_pdl: bool = False,
        trigger_completion_at_end: bool = True, output: Any = None, residual_out: Any = None,
        norm_out: Any = None, quant_out: Any = None, scale_out: Any = None, residual_in: Any = None,
        rms_gamma: Any = None, rms_eps: float = 1e-6, scale_factor: Any = None,
        layout_code: Any = None, use_oneshot: Any = None, fp32_acc: bool = False,
        moe_reduction_device_num_experts: Any = None, moe_reduction_scale_input: Any = None,
        moe_reduction_active_experts_token_input: Any = None, moe_reduction_token_input: Any = None,
        expanded_idx_to_permuted_idx: Any = None, expert_scale_factor: Any = None,
        shared_expert_output: Any = None, block_quant_group_size: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        self.calls.append(
            {
                "pattern": pattern,
                "pdl": launch_with_pdl,
                "at_end": trigger_completion_at_end,
                "one_shot": use_oneshot,
                "fp32_acc": fp32_acc,
            }
        )
        total = input.float() * workspace.made["world_size"]
        if pattern == 0:
            return output.copy_(total)
        total += residual_in
        residual_out.copy_(total)
        scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + rms_eps)
        return norm_out.copy_(total * scale * rms_gamma)

    def trtllm_destroy_ipc_workspace_for_all_reduce_fusion(
        self, workspace: Any, group: Any = None
    ) -> None:
        self.released.append(workspace)


class FakeVllm(types.ModuleType):
    """``flashinfer.comm.vllm_ar``: numbers captured calls like the C++ object does."""

    def __init__(self) -> None:
        super().__init__("flashinfer.comm.vllm_ar")
        self.capturing = False
        self.calls: list[tuple[int, int, int]] = []
        self.pending: list[int] = []
        self.registered: list[tuple[Any, Any]] = []
        self.disposed = 0
        self.slots: Any = None

    def get_vllm_comm_module(self) -> None: ...

    def meta_size(self) -> int:
        return 4096

    def init_custom_ar(
        self, ipc_tensors: list[int], rank_data: torch.Tensor, rank: int, full_nvlink: bool
    ) -> int:
        assert rank_data.dtype == torch.uint8  # its element count is taken for bytes
        self.slots, self.linked = rank_data, full_nvlink
        return 77

    def dispose(self, fa: int) -> None:
        self.disposed += 1

    def all_reduce(
        self, fa: int, inp: torch.Tensor, out: torch.Tensor, reg_buffer: int,
        reg_buffer_sz_bytes: int, num_ctas: int,
    ) -> None:  # fmt: skip
        self.calls.append((reg_buffer, reg_buffer_sz_bytes, num_ctas))
        assert reg_buffer == 0 or inp.numel() * inp.element_size() <= reg_buffer_sz_bytes
        assert reg_buffer or self.capturing, "an eager input is not registered"
        if self.capturing:
            self.pending.append(reg_buffer or inp.data_ptr())
        out.copy_(inp * WORLD)

    def get_graph_buffer_ipc_meta(self, fa: int) -> tuple[list[int], list[int]]:
        return [-1, 2] * 32 * len(self.pending), [16 * i for i in range(len(self.pending))]

    def register_buffer(self, fa: int, fake_ipc_ptrs: list[int]) -> None:
        self.eager = fake_ipc_ptrs

    def register_graph_buffers(
        self, fa: int, handles: list[list[int]], offsets: list[list[int]]
    ) -> None:
        assert all(0 <= b < 256 for handle in handles for b in handle)
        self.registered.append((handles, offsets))
        self.pending = []


class Handle(ctypes.Structure):
    """cudaIpcMemHandle_t as FlashInfer declares it."""

    _fields_ = (("internal", ctypes.c_byte * 128),)


class FakeCudart:
    """Counts what is allocated and mapped; every number is a pointer."""

    def __init__(self) -> None:
        self.live: list[int] = []
        self.mapped: list[int] = []
        self.zeroed: list[tuple[int, int]] = []
        self.lib = types.SimpleNamespace(
            cudaIpcCloseMemHandle=lambda pointer: self.mapped.remove(pointer.value)
        )

    def cudaMalloc(self, size: int) -> ctypes.c_void_p:  # noqa: N802
        self.live.append(0x1000 * (len(self.live) + 1))
        return ctypes.c_void_p(self.live[-1])

    def cudaFree(self, devPtr: ctypes.c_void_p) -> None:  # noqa: N802, N803
        self.live.remove(devPtr.value or 0)

    def cudaMemset(self, devPtr: ctypes.c_void_p, value: int, count: int) -> None:  # noqa: N802, N803
        self.zeroed.append((devPtr.value or 0, count))

    def cudaDeviceSynchronize(self) -> None: ...  # noqa: N802

    def cudaIpcGetMemHandle(self, devPtr: ctypes.c_void_p) -> Handle:  # noqa: N802, N803
        handle = Handle()
        handle.internal[0] = (devPtr.value or 0) // 0x1000
        return handle

    def cudaIpcOpenMemHandle(self, handle: Handle) -> ctypes.c_void_p:  # noqa: N802
        self.mapped.append(0x100000 + handle.internal[0])
        return ctypes.c_void_p(self.mapped[-1])


class Fakes:
    """The fake modules; ``install`` puts them where imports find them."""

    def __init__(self) -> None:
        self.comm, self.vllm, self.cudart = FakeComm(), FakeVllm(), FakeCudart()
        self.free = 2**40  # bytes of free GPU memory

    def install(self, patch: Any) -> None:
        """``patch``: pytest's monkeypatch, or anything with its setattr and setitem."""
        package = types.ModuleType("flashinfer")
        package.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None, origin="/none/x.py")
        trtllm = types.ModuleType("flashinfer.comm.trtllm_ar")
        trtllm.get_trtllm_comm_module = lambda: None  # type: ignore[attr-defined]
        multicast = types.ModuleType("flashinfer.comm.trtllm_mnnvl_ar")
        multicast.get_trtllm_mnnvl_comm_module = lambda: None  # type: ignore[attr-defined]
        mnnvl = types.ModuleType("flashinfer.comm.mnnvl")
        mnnvl.TorchDistBackend = types.SimpleNamespace  # type: ignore[attr-defined]
        ipc = types.ModuleType("flashinfer.comm.cuda_ipc")
        ipc.cudart, ipc.cudaIpcMemHandle_t = self.cudart, Handle  # type: ignore[attr-defined]
        package.comm = self.comm  # type: ignore[attr-defined]
        self.comm.vllm_ar, self.comm.cuda_ipc = self.vllm, ipc  # type: ignore[attr-defined]
        for module in (package, self.comm, trtllm, multicast, mnnvl, self.vllm, ipc):
            patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 2 * self.free))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.vllm.capturing)
        patch.setattr(
            torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="u")
        )


def rows(num_tokens: int, hidden_size: int = 2048, dtype: Any = torch.bfloat16) -> torch.Tensor:
    """Small integers, exact in every dtype."""
    torch.manual_seed(num_tokens)
    return torch.randint(-8, 8, (num_tokens, hidden_size)).to(dtype)


def check_reduces(backend: Any, x: torch.Tensor) -> None:
    """Two calls in a row: right sums, new tensors, inputs left alone."""
    kept = x.clone()
    first, second = backend.all_reduce(x), backend.all_reduce(x + 1)
    assert torch.equal(x, kept), "the input keeps its value"
    assert torch.equal(first, 2 * x) and torch.equal(second, 2 * (x + 1)), "results are new tensors"
