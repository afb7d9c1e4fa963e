"""Symmetric memory of a group: each rank's slots, mapped by every rank, and this rank's counters.

Allocation and rendezvous are torch's (``torch.distributed._symmetric_memory``); this file votes
before and after each step, so that a rank that fails makes all fail alike, and frees what it got.
It knows sizes and sentinels, no kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from fusewise.backends.native.cuda.params import DEAD_WORDS
from fusewise.backends.native.instance import (
    MAX_BLOCKS,
    UNIT_BYTES,
    VECTOR_BYTES,
    sources_of,
)
from fusewise.backends.steps import PTRACE_HINT, rendezvous, together
from fusewise.errors import UnavailableError, WorkspaceError

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

EMPTY_BYTE = 0xFF  # every byte of the sentinel 0xffffffff
STATUS_WORDS = 8  # struct Status in cuda/slots.cuh needs five


_together = partial(together, kind=WorkspaceError)


@dataclass(frozen=True)
class SlotLayout:
    """How much slot memory a strategy needs; equal on all ranks.

    Args:
        strategy: ``one_shot`` keeps two phases of every unit from every rank, its own place free;
            of two ranks from the peer alone. ``two_shot`` keeps two phases of the rank's own
            columns and one gathered copy of everybody's, likewise, and for the partial sums a
            word per unit, rank and block that may share a tile.
        world_size: ranks.
        units: 512-byte units per source and phase.
    """

    strategy: Literal["one_shot", "two_shot"]
    world_size: int
    units: int

    @classmethod
    def one_shot(cls, shape: Shape, world_size: int) -> SlotLayout:
        """Room for every message of at most ``shape``'s bytes whose rows waste no more units."""
        return cls("one_shot", world_size, units_of(shape.num_tokens, shape.row_bytes))

    @classmethod
    def two_shot(cls, shape: Shape, world_size: int) -> SlotLayout:
        """Room for ``shape``; a row of each rank's columns fills whole units."""
        units = units_of(shape.num_tokens, shard_vectors(shape, world_size) * VECTOR_BYTES)
        return cls("two_shot", world_size, units)

    def with_slack(self) -> SlotLayout:
        """Room also for other row widths with as many bytes.

        A row that is no multiple of a unit wastes the end of one: 7 % at hidden 2880 in bf16, and
        42 % where eight ranks share its columns. Rows of less than 1 KiB may not all fit.
        """
        part = 8 if self.strategy == "one_shot" else 2
        return replace(self, units=self.units + self.units // part + 1)

    @property
    def size_bytes(self) -> int:
        """Bytes of slots on each rank."""
        vectors = sources_of(self.world_size) * self.units * UNIT_BYTES
        if self.strategy == "one_shot":
            return 2 * vectors
        words = self.world_size * self.units * MAX_BLOCKS * 4
        return 3 * vectors + -(-words // UNIT_BYTES) * UNIT_BYTES

    def lacks(self, other: SlotLayout) -> str | None:
        """Why ``other`` does not fit in here, with both sizes; None if it does."""
        if other.units <= self.units:
            return None
        return f"needs {other.units} slots of {UNIT_BYTES} bytes per peer, has {self.units}"

    def union(self, other: SlotLayout) -> SlotLayout:
        """The smallest layout that holds both."""
        return replace(self, units=max(self.units, other.units))


def units_of(num_tokens: int, row_bytes: int) -> int:
    """Units of ``num_tokens`` rows, each beginning a new one."""
    return num_tokens * -(-row_bytes // UNIT_BYTES)


def shard_vectors(shape: Shape, world_size: int) -> int:
    """16-byte vectors of a row that one rank reduces in two_shot; the last rank may have fewer."""
    return -(-(shape.row_bytes // VECTOR_BYTES) // world_size)


class Region:
    """One allocation: slots of every rank and the epochs that belong to them.

    Attributes:
        layout: what it was made for.
        slots: per rank, the address at which this rank reaches its slots.
        epochs: one counter per unit, in this rank's own memory, zero at first.
    """

    def __init__(self, group: Group, layout: SlotLayout, label: str) -> None:
        self.layout = layout
        buffer, self.epochs = _together(group, f"{label}: allocate", lambda: self._allocate(group))
        self._handle = _together(
            group, f"{label}: rendezvous", lambda: rendezvous(buffer, group), PTRACE_HINT
        )
        self._buffer: Tensor | None = buffer
        self.slots = [int(pointer) for pointer in self._handle.buffer_ptrs]
        # The fill above ended before anybody left this vote: no peer pushes before it.
        _together(group, f"{label}: map", lambda: self._check(group))

    def _allocate(self, group: Group) -> tuple[Tensor, Tensor]:
        buffer = symmetric_bytes(self.layout.size_bytes, group.device)
        buffer.fill_(EMPTY_BYTE)
        epochs = torch.zeros(self.layout.units, dtype=torch.int32, device=group.device)
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        return buffer, epochs

    def _check(self, group: Group) -> None:
        if len(self.slots) != group.world_size or not all(self.slots):
            raise WorkspaceError("a peer's memory is not mapped", got=str(self.slots))

    def free(self) -> None:
        """Drops this rank's memory and mappings. A peer's own mapping of it lives on."""
        self._handle = self._buffer = None
        self.epochs = torch.empty(0, dtype=torch.int32)
        self.slots = []


class Workspace:
    """The regions of one backend, and the words in which it says that its group is dead.

    Constructing, reserving and closing are collective.

    Args:
        group: the ranks.
        layout: what to make room for first.
        label: the backend's id, for messages.

    Raises:
        WorkspaceError: on every rank, naming the rank that could not allocate or map.
    """

    def __init__(self, group: Group, layout: SlotLayout, label: str) -> None:
        self.group, self._label = group, label
        self.dead, self.status = _together(group, f"{label}: status", self._words)
        self.region = Region(group, layout, label)
        self._older: list[Region] = []
        self.closed = False

    def _words(self) -> tuple[Tensor, Tensor]:
        dead = torch.zeros(DEAD_WORDS, dtype=torch.int32, device=self.group.device)
        return dead, _mapped_words(STATUS_WORDS)

    def reserve(self, layout: SlotLayout) -> bool:
        """Makes room for ``layout`` too; True if that took a new region.

        Graphs captured before keep the older region, so it stays allocated until ``close``.

        Raises:
            DisagreementError: ranks ask for different layouts.
            UnavailableError: the workspace is closed, or a graph is being captured.
            WorkspaceError: no memory; the workspace is as it was before.
        """
        if self.closed:
            raise UnavailableError(f"{self._label}: the workspace is closed")
        if self.group.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnavailableError(
                f"{self._label}: a workspace cannot grow while a graph is captured",
                hint="Reserve the largest shape before capturing.",
            )
        wanted = [layout.strategy, layout.world_size, layout.units]
        self.group.agree(f"{self._label}: workspace", wanted)
        if self.region.layout.lacks(layout) is None:
            return False
        region = Region(self.group, self.region.layout.union(layout), self._label)
        self._older.append(self.region)
        self.region = region
        return True

    def close(self) -> None:
        """Frees every region once this rank's kernels have ended. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        if self.group.device.type == "cuda":
            torch.cuda.synchronize(self.group.device)
        for region in [self.region, *self._older]:
            region.free()
        self._older.clear()


def symmetric_bytes(size_bytes: int, device: torch.device) -> Tensor:
    """Symmetric memory that is given back when the tensor dies.

    ``_symmetric_memory.empty`` would take it from a pool that keeps it for later (torch 2.12+).
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory.empty_strided_p2p((size_bytes,), (1,), torch.uint8, device)


def _mapped_words(count: int) -> Tensor:
    """Zeroed host words that the device writes and the host reads without a synchronisation.

    Page-locked memory has one address for host and device (unified addressing, 64-bit Linux).
    """
    return torch.zeros(count, dtype=torch.int32, pin_memory=True)
