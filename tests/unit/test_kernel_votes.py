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
from tests.groups import BOUND_S, Room, ThreadGroup

pytest.importorskip("cuda.core", reason='needs pip install "fusewise[cuda]"')


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
        workspace, "symmetric_bytes",
        fails_at("allocate", lambda size, device: torch.empty(64, dtype=torch.uint8)),
    )  # fmt: skip
    monkeypatch.setattr(workspace, "rendezvous", fails_at("rendezvous", lambda b, g: handle))
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

    threads = [threading.Thread(target=build, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=BOUND_S)
        assert not thread.is_alive()
    assert set(said) == {0, 1}
    for text in said.values():
        assert f"rank {failing}: RuntimeError: no {step} today" in text
    assert set(reached) == set(STEPS[: STEPS.index(step) + 1]), "a rank went on alone"
