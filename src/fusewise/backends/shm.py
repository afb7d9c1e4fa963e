"""CPU ranks of one host: a fused one-shot over shared memory.

Each rank copies its rows into its slot, posts an epoch, waits for everybody's epoch, sums all
slots in rank order in fp32, adds the residual and normalises. Long messages go in chunks of rows.

Ordering. x86 keeps stores in program order and loads in program order (Intel SDM vol. 3A, 9.2.2;
AMD64 APM vol. 2, 7.2): a peer that sees an epoch sees the slot written before it, and a slot read
after the epoch was seen is not older. Two slots per rank take turns: rank r writes slot e mod 2 at
epoch e only after it saw every epoch reach e - 1, and a peer posts e - 1 only after it finished
reading at e - 2. So nobody still reads the slot that is being written. Processors that may
reorder two stores are refused.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fusewise.backends.base import Backend
from fusewise.errors import RankTimeoutError, UnavailableError, WorkspaceError
from fusewise.profiles.schema import Numerics

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

_STORE_ORDERED = ("x86_64", "AMD64")
_SHM = Path("/dev/shm")
_LINE = 64  # bytes of a cache line: one epoch per line, so that posting disturbs no neighbour
_CHUNK_BYTES = 512 * 1024  # two slots of a few ranks stay in a core's L2 and its L3 share
_SPINS = 200  # polls between two yields: near 20 µs, above the usual skew of two pinned ranks
_AWAKE_S = 1e-3  # a peer that is later than this does something else, and may need this core for it
_NAP_SHARE, _LONGEST_NAP_S = 0.05, 1e-3  # a nap adds at most this share to what was waited so far


class OneShot(Backend):
    """Fused all-reduce + residual + RMSNorm between CPU ranks of one host."""

    id = "shm.one_shot"
    provider = "shm"
    fused = True
    numerics = Numerics(accumulation="float32", order="rank", rounds_sum=False)

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        if node.device_type != "cpu":
            return "for CPU ranks only"
        if node.nodes > 1:
            return "ranks are on several hosts; shared memory reaches one"
        if platform.machine() not in _STORE_ORDERED:
            return f"the order of stores on {platform.machine()} is not known to be x86's"
        return None if _SHM.is_dir() else f"{_SHM} is not there; mount a tmpfs on it"

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        self._slot_bytes = max(_CHUNK_BYTES, -(-max_shape.row_bytes // _LINE) * _LINE)
        self._epoch = 0
        self._dead: str | None = None
        self._memory = _map_shared(group, self._total_bytes())
        epochs = memoryview(self._memory)[: group.world_size * _LINE]
        self._epochs = epochs.cast("q")
        self._slots = torch.frombuffer(self._memory, dtype=torch.uint8)[len(epochs) :].view(
            2, group.world_size, self._slot_bytes
        )

    def _total_bytes(self) -> int:
        return self.group.world_size * (_LINE + 2 * self._slot_bytes)

    def admits(self, shape: Shape) -> str | None:
        if shape.row_bytes > self._slot_bytes:
            return f"a row of {shape.row_bytes} bytes is wider than a slot of {self._slot_bytes}"
        return None

    def all_reduce(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for begin, end in self._chunks(x):
            out[begin:end] = self._sum(x[begin:end])
        return out

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        norm, total = torch.empty_like(x), torch.empty_like(x)
        gain = weight.float() + weight_bias
        for begin, end in self._chunks(x):
            value = self._sum(x[begin:end])
            if residual is not None:
                value += residual[begin:end]
            total[begin:end] = value
            scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
            norm[begin:end] = value.mul_(scale).mul_(gain)
        return norm, total

    def _chunks(self, x: Tensor) -> list[tuple[int, int]]:
        rows = max(1, self._slot_bytes // (x.shape[1] * x.element_size()))
        return [(b, min(b + rows, x.shape[0])) for b in range(0, x.shape[0], rows)]

    def _sum(self, rows: Tensor) -> Tensor:
        """fp32 sum over ranks, in rank order, so that all ranks get the same bits."""
        if self._dead:
            raise UnavailableError(f"shm.one_shot of {self.group} is closed", got=self._dead)
        self._epoch += 1
        used = rows.numel() * rows.element_size()
        slots = self._slots[self._epoch % 2, :, :used]
        mine = slots[self.group.rank].view(rows.dtype).view(rows.shape)
        mine.copy_(rows)
        # The slot before the epoch: x86 keeps these two stores in this order.
        self._epochs[self.group.rank * _LINE // 8] = self._epoch
        self._wait()
        # A copy even for fp32: adding into rank 0's slot would change what its peers read.
        total = slots[0].view(rows.dtype).view(rows.shape).to(torch.float32, copy=True)
        for rank in range(1, self.group.world_size):
            total += slots[rank].view(rows.dtype).view(rows.shape)
        return total

    def _wait(self) -> None:
        """Until every rank has posted this epoch; a rank that never does is named."""
        began = 0.0
        for peer in range(self.group.world_size):
            at, spins = peer * _LINE // 8, 0
            while self._epochs[at] < self._epoch:
                spins += 1
                if spins % _SPINS:
                    continue
                os.sched_yield()
                began = began or time.monotonic()
                waited_s = time.monotonic() - began
                if waited_s > _AWAKE_S:
                    time.sleep(min(_NAP_SHARE * waited_s, _LONGEST_NAP_S))
                if waited_s > self.group.timeout_s:
                    self._dead = f"rank {self.group.ranks[peer]} did not arrive"
                    raise RankTimeoutError(
                        f"shm.one_shot of {self.group}",
                        expected=f"epoch {self._epoch} within {self.group.timeout_s:g} s",
                        got=self._dead,
                        hint="Every rank must make the same calls in the same order.",
                    )

    def close(self) -> None:
        self._dead = self._dead or "close() was called"
        self._epochs = memoryview(b"")
        self._slots = torch.empty(0)
        with contextlib.suppress(BufferError):  # a caller's view keeps the mapping until it dies
            self._memory.close()


def _map_shared(group: Group, size_bytes: int) -> mmap.mmap:
    """A zeroed mapping shared by all ranks. The file never has a name, so none can be left behind.

    Peers open it through rank 0's descriptor, which the vote keeps open until all have it.

    Raises:
        WorkspaceError: on every rank, naming the rank that could not create or map it.
    """
    handle, mapping = -1, None
    error: Exception | str | None = None
    try:
        handle = _reserve(size_bytes) if group.rank == 0 else -1
    except OSError as fault:
        error = fault
    path = group.broadcast("shm: name", f"/proc/{os.getpid()}/fd/{handle}" if handle >= 0 else "")
    try:
        if path:
            with Path(path).open("r+b") as file:
                mapping = mmap.mmap(file.fileno(), size_bytes)
    except (OSError, ValueError) as fault:
        error = error or fault
    if not path and error is None:
        error = "rank 0 made no shared memory"
    failed = group.vote("shm: map", error)
    if handle >= 0:
        os.close(handle)
    if failed or mapping is None:
        raise WorkspaceError(
            f"shm.one_shot of {group}",
            expected=f"{size_bytes} bytes of shared memory",
            got=failed,
            hint=f"Enlarge {_SHM} (in a container: --shm-size) or use --without shm.",
        )
    return mapping


def _reserve(size_bytes: int) -> int:
    """A nameless file in shared memory with its pages reserved."""
    handle = os.open(_SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Reserves the pages now: a full tmpfs is an error here and would be SIGBUS at first touch.
        os.posix_fallocate(handle, 0, size_bytes)
    except OSError:
        os.close(handle)
        raise
    return handle
