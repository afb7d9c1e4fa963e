"""A rank that fails while a native backend is built: every rank hears of it, nobody waits."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest
import torch

from fusewise.backends.native import workspace
from fusewise.backends.native.cuda.launch import Kernels
from fusewise.backends.native.strategies import OneShot
from fusewise.errors import UnavailableError
from fusewise.shape import Shape

pytest.importorskip("cuda.core", reason='needs pip install "fusewise[cuda]"')

WORLD = 2
BOUND_S = 20.0


class Room:
    """Where the threads of a group meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(WORLD, timeout=BOUND_S)
        self.values: list[Any] = [None] * WORLD


class ThreadGroup:
    """A group whose ranks are threads; votes as ``Group`` does."""

    def __init__(self, rank: int, room: Room) -> None:
        self.rank, self.room = rank, room
        self.world_size, self.ranks, self.timeout_s = WORLD, list(range(WORLD)), 5.0
        self.device = torch.device("cpu")

    def gather(self, phase: str, value: Any) -> list[Any]:
        self.room.values[self.rank] = (phase, value)
        self.room.barrier.wait()
        seen = list(self.room.values)
        self.room.barrier.wait()
        assert len({phase for phase, _ in seen}) == 1, f"ranks are at different steps: {seen}"
        return [value for _, value in seen]

    def vote(self, phase: str, error: Any) -> str | None:
        errors = self.gather(phase, None if error is None else f"{type(error).__name__}: {error}")
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
        return f"{phase}: {'; '.join(failed)}" if failed else None

    def __str__(self) -> str:
        return "group of two threads"


STEPS = ["device", "status", "allocate", "rendezvous", "compile"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("failing", [0, 1])
def test_one_failing_rank_fails_all(
    monkeypatch: pytest.MonkeyPatch, step: str, failing: int
) -> None:
    current = threading.local()
    reached: list[str] = []

    def fails_at(name: str, result: Any) -> Any:
        def run(*arguments: Any) -> Any:
            reached.append(name)
            if name == step and current.rank == failing:
                raise RuntimeError(f"no {name} today")
            return result(*arguments)

        return run

    facts = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    handle = types.SimpleNamespace(buffer_ptrs=[4096, 8192])
    monkeypatch.setattr(torch.cuda, "get_device_properties", fails_at("device", lambda d: facts))
    monkeypatch.setattr(
        workspace, "_symmetric_bytes",
        fails_at("allocate", lambda size, device: torch.empty(64, dtype=torch.uint8)),
    )  # fmt: skip
    monkeypatch.setattr(workspace, "_rendezvous", fails_at("rendezvous", lambda b, g: handle))
    words = fails_at("status", lambda n: torch.zeros(n, dtype=torch.int32))
    monkeypatch.setattr(workspace, "_mapped_words", words)
    monkeypatch.setattr(Kernels, "prepare", fails_at("compile", lambda *a: None))
    room, said = Room(), {}

    def build(rank: int) -> None:
        current.rank = rank
        try:
            OneShot(ThreadGroup(rank, room), Shape(4, 2048))  # type: ignore[arg-type]
        except UnavailableError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=build, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=BOUND_S)
        assert not thread.is_alive()
    assert set(said) == {0, 1}
    for text in said.values():
        assert f"rank {failing}: RuntimeError: no {step} today" in text
    assert set(reached) == set(STEPS[: STEPS.index(step) + 1]), "a rank went on alone"
