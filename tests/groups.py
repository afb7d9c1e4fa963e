"""Groups without processes: ``Group`` itself, with only the gathering replaced."""

from __future__ import annotations

import threading
import types
from typing import Any

import torch

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
