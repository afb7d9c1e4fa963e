"""Groups without processes: ``Group`` itself, with its gathering or its store replaced."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore

from fusewise.errors import FusewiseError
from fusewise.ranks.group import Group

BOUND_S = 20.0


class MirrorGroup(Group):
    """Rank 0 of a group whose other ranks answer what it says, or ``other``."""

    process_group: Any = None

    def __init__(self, world_size: int = 2, other: Any = None) -> None:
        self.rank, self.world_size, self.ranks = 0, world_size, list(range(world_size))
        self.device, self.timeout_s = torch.device("cpu"), 5.0
        self.process_group, self.name = types.SimpleNamespace(group_name="0"), "0"
        self.phases: list[str] = []
        self._other = other

    def gather(self, phase: str, value: Any) -> list[Any]:
        self.phases.append(phase)
        return [value, *[self._other or value] * (self.world_size - 1)]

    def bounded_store(self) -> nullcontext[None]:  # type: ignore[override]
        return nullcontext()


class Room:
    """Where the threads of a group meet."""

    def __init__(self, world_size: int = 2) -> None:
        self.barrier = threading.Barrier(world_size, timeout=BOUND_S)
        self.values: list[Any] = [None] * world_size


class ThreadGroup(MirrorGroup):
    """A group whose ranks are threads."""

    def __init__(self, rank: int, room: Room) -> None:
        super().__init__(len(room.values))
        self.rank, self.room = rank, room

    def gather(self, phase: str, value: Any) -> list[Any]:
        self.room.values[self.rank] = (phase, value)
        self.room.barrier.wait()
        seen = list(self.room.values)
        self.room.barrier.wait()
        assert len({phase for phase, _ in seen}) == 1, f"ranks are at different steps: {seen}"
        return [value for _, value in seen]


class StoreGroup(Group):
    """A rank over a store in memory, without torch's process group."""

    def __init__(self, store: HashStore, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.ranks = rank, world_size, list(range(world_size))
        self.name, self.device, self.timeout_s = "0", torch.device("cpu"), timeout_s
        self._store, self._turn = PrefixStore("test", store), 0


class StoreRanks:
    """Threads that meet at a store; ``come`` runs some of them and says how each ended."""

    def __init__(self, world_size: int = 3, timeout_s: float = BOUND_S) -> None:
        store = HashStore()
        self.groups = [StoreGroup(store, r, world_size, timeout_s) for r in range(world_size)]
        self.ended: dict[int, str] = {}

    def come(self, *ranks: int, ask: Callable[[Group], None]) -> None:
        threads = [threading.Thread(target=self._one, args=(r, ask)) for r in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND_S)
            assert not thread.is_alive()

    def _one(self, rank: int, ask: Callable[[Group], None]) -> None:
        try:
            ask(self.groups[rank])
            self.ended[rank] = "went ahead"
        except FusewiseError as error:
            self.ended[rank] = str(error)
