"""vLLM's custom all-reduce as FlashInfer ships it: peers read each other's memory directly.

Outside of a capture the message is copied into a buffer that all peers have mapped. Between
``capture_begin`` and ``capture_end`` the captured kernels read every rank's own tensor in place;
its address reaches the peers in ``capture_end``, before which such a graph must not be replayed.
A graph captured without the two is right as well: it copies.

Ordering (FlashInfer 0.6.11.post2, ``vllm_custom_all_reduce.cuh``): every kernel starts with a
barrier of all ranks, so a peer's copy is complete before it is read; and no rank leaves the kernel
while a peer still reads its message. Calls must come from one stream: they share the signals.

Sources of the limits: the same file and ``csrc/vllm_custom_all_reduce.cu``. vLLM's own bound of
8 MiB is an engine's choice and lives with the engines' tables, not here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from fusewise.backends.base import Backend
from fusewise.backends.flashinfer_limits import package_reason
from fusewise.backends.steps import not_on_one_host, together
from fusewise.errors import RankError, UnavailableError
from fusewise.profiles.schema import Numerics

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

_WORLD_SIZES = (2, 4, 6, 8)  # REDUCE_CASE
_VECTOR_BYTES = 16  # packed_t
_NUM_CTAS = 36  # kMaxBlocks, and what vLLM launches
_POINTERS = 8  # RankData holds eight, whatever the world size
_SLOTS = 2**17  # vLLM's 8 MiB of RankData; one per captured call, one for the eager buffer
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_UNSHARED = ("expandable_segments:True", "backend:cudaMallocAsync")  # no IPC handle for such memory
_ALLOCATOR_HINT = f"Remove {' and '.join(_UNSHARED)} from the allocator's settings."
_HINT = "Check peer access with `nvidia-smi topo -p2p r`; or leave it out: --without custom."


class Custom(Backend):
    """One kernel over mapped peer memory: one stage for small messages, two for large ones."""

    id = "custom"
    provider = "custom"
    # fp32 sums; two-stage starts each share at its owner's rank, so the order depends on the size.
    numerics = Numerics(accumulation="float32", order="algorithm", rounds_sum=True)

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        reason = package_reason(node, "vllm_comm") or not_on_one_host(node.nodes, node.world_size)
        if reason:
            return reason
        if (node.sm or 0) < 80:
            return f"its bf16 kernels need sm_80 or newer, this is sm_{node.sm}; use nccl"
        if node.world_size not in _WORLD_SIZES:
            return f"takes {_WORLD_SIZES} ranks, not {node.world_size}; use nccl"
        if node.world_size > 2 and not node.fabric.startswith("nv"):
            return f"more than two GPUs must be joined by NVLink, these are by {node.fabric}"
        return _allocator_reason()

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        self._bytes = -(-max(max_shape.message_bytes, 1) // _VECTOR_BYTES) * _VECTOR_BYTES
        self._own: list[Any] = []  # what this rank allocated: signals with scratch, eager buffer
        self._opened: list[Any] = []  # mappings of the peers'
        self._handle = 0  # the C++ object
        self._captured = 0
        self._registering = False
        self._stopped: str | None = None
        try:
            self._build()
        except UnavailableError:  # by vote, so every rank is here
            self._release()
            raise

    def _build(self) -> None:
        group = self.group
        self._ops, self._cuda = together(group, "custom: load kernels", _load)
        exported = together(group, "custom: allocate", self._allocate, _HINT)
        facts = group.gather("custom: handles", exported)
        pointers = together(group, "custom: map peers", lambda: self._map(facts), _HINT)
        together(group, "custom: start", lambda: self._start(*pointers))

    def _allocate(self) -> dict[str, Any]:
        """Zeroed memory of this rank: the kernels' signals count from zero."""
        cudart = self._cuda.cudart
        with torch.cuda.device(self.group.device):
            for size in (self._ops.meta_size() + self._bytes, self._bytes):
                self._own.append(cudart.cudaMalloc(size))
                cudart.cudaMemset(self._own[-1], 0, size)
            cudart.cudaDeviceSynchronize()
            handles = [bytes(cudart.cudaIpcGetMemHandle(pointer)).hex() for pointer in self._own]
        uuid = str(torch.cuda.get_device_properties(self.group.device).uuid)
        return {"handles": handles, "uuid": uuid}

    def _map(self, facts: list[dict[str, Any]]) -> tuple[list[list[int]], bool]:
        """Both buffers' addresses on all ranks as this rank sees them, and whether all NVLink."""
        linked = _all_linked([fact["uuid"] for fact in facts], self.group.rank)
        if self.group.world_size > 2 and not linked:  # the kernel would not be launched at all
            raise UnavailableError("some pair of these GPUs has no NVLink between them")
        pointers: list[list[int]] = [[], []]
        with torch.cuda.device(self.group.device):
            for rank, fact in enumerate(facts):
                for buffer, handle in enumerate(fact["handles"]):
                    pointer = self._own[buffer] if rank == self.group.rank else self._open(handle)
                    pointers[buffer].append(pointer.value)
        return pointers, linked

    def _open(self, handle: str) -> Any:
        raw = self._cuda.cudaIpcMemHandle_t.from_buffer_copy(bytes.fromhex(handle))
        self._opened.append(self._cuda.cudart.cudaIpcOpenMemHandle(raw))
        return self._opened[-1]

    def _start(self, pointers: list[list[int]], linked: bool) -> None:
        signals, eager = pointers
        # A captured kernel reads its peers' addresses from a slot that is filled when the graph is
        # registered. Until then every slot names the eager buffer, so that a graph nobody
        # registers finds its own copies there.
        slot = torch.tensor(eager + [0] * (_POINTERS - len(eager)), dtype=torch.int64)
        self._slots = slot.repeat(_SLOTS).view(torch.uint8).to(self.group.device)
        torch.cuda.synchronize(self.group.device)
        self._handle = self._ops.init_custom_ar(signals, self._slots, self.group.rank, linked)
        self._ops.register_buffer(self._handle, eager)

    def admits(self, shape: Shape) -> str | None:
        if self._stopped:
            return self._stopped
        if shape.message_bytes == 0 or shape.message_bytes % _VECTOR_BYTES:
            return f"{shape.message_bytes} bytes are no multiple of {_VECTOR_BYTES}"
        return super().admits(shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._stopped:
            raise UnavailableError(f"custom of {self.group} cannot run", got=self._stopped)
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            self._captured += 1
            if self._captured >= _SLOTS:
                raise UnavailableError(
                    f"custom of {self.group} has no slot left for this graph",
                    expected=f"fewer than {_SLOTS} captured calls",
                    hint="Capture fewer graphs, or build the communicator with without=['custom'].",
                )
        in_place = capturing and self._registering
        eager, size = (0, 0) if in_place else (self._own[1].value, self._bytes)
        out = torch.empty_like(x)
        self._ops.all_reduce(self._handle, x, out, eager, size, _NUM_CTAS)
        return out

    def capture_begin(self) -> None:
        self._registering = True

    def capture_end(self) -> None:
        """Tells all peers the addresses that captured kernels read. Collective.

        Raises:
            RankError: ranks captured different numbers of calls; the backend is then out of use.
            UnavailableError: an address cannot be shared or mapped on some rank; likewise.
        """
        self._registering = False
        if self._stopped:
            return
        try:
            self._register()
        except (RankError, UnavailableError):
            self._stopped = "the registration of a captured graph failed"
            raise

    def _register(self) -> None:
        group, ops = self.group, self._ops
        exported = together(group, "custom: export graph buffers", self._export, _ALLOCATOR_HINT)
        facts = group.gather("custom: graph buffers", exported)
        counts = [len(fact["offsets"]) for fact in facts]
        if len(set(counts)) > 1:
            raise RankError(
                f"custom of {group}: ranks captured different graphs",
                expected="equally many all-reduces on every rank",
                got=", ".join(f"rank {r}: {n}" for r, n in zip(group.ranks, counts, strict=True)),
            )
        if counts[0]:
            handles = [list(bytes.fromhex(fact["handles"])) for fact in facts]
            offsets = [fact["offsets"] for fact in facts]
            together(
                group,
                "custom: map graph buffers",
                lambda: ops.register_graph_buffers(self._handle, handles, offsets),
            )

    def _export(self) -> dict[str, Any]:
        handles, offsets = self._ops.get_graph_buffer_ipc_meta(self._handle)
        # The extension hands out C chars, which are signed.
        return {"handles": bytes(b & 0xFF for b in handles).hex(), "offsets": list(offsets)}

    def close(self) -> None:
        if not self._own:
            return
        self._stopped = "it is closed"
        torch.cuda.synchronize(self.group.device)
        self.group.barrier("custom: close")  # no peer's kernel reads this rank's memory any more
        self._release()

    def _release(self) -> None:
        """Unmaps the peers' memory, then frees its own once they have unmapped it too."""
        if self._handle:
            self._ops.dispose(self._handle)
        for pointer in self._opened:
            self._cuda.cudart.lib.cudaIpcCloseMemHandle(pointer)
        self.group.barrier("custom: unmapped")
        for pointer in self._own:
            self._cuda.cudart.cudaFree(pointer)
        self._handle, self._own, self._opened = 0, [], []


def _load() -> tuple[Any, Any]:
    """FlashInfer's extension, compiled or loaded, and its CUDA runtime bindings."""
    from flashinfer.comm import cuda_ipc, vllm_ar

    vllm_ar.get_vllm_comm_module()
    return vllm_ar, cuda_ipc


def _allocator_reason() -> str | None:
    for name in _ALLOCATOR_VARIABLES:
        settings = os.environ.get(name, "").replace(" ", "").lower().split(",")
        for setting in _UNSHARED:
            if setting.lower() in settings:
                return (
                    "captured tensors must come from cudaMalloc to be shared with peers; remove"
                    f" {setting} from {name}"
                )
    return None


def _all_linked(uuids: list[str], rank: int) -> bool:
    """Whether NVML says this rank's GPU has NVLink peer access to each of the others."""
    import pynvml

    pynvml.nvmlInit()
    try:
        gpus = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        return all(
            pynvml.nvmlDeviceGetP2PStatus(gpus[rank], gpu, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
            == pynvml.NVML_P2P_STATUS_OK
            for peer, gpu in enumerate(gpus)
            if peer != rank
        )
    finally:
        pynvml.nvmlShutdown()
