"""Ranks that do not come, come out of step, or leave while others wait: named, within a bound."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_process_group_store

from fusewise.backends import shm
from fusewise.errors import DisagreementError, RankError, RankTimeoutError, WorkspaceError
from fusewise.ranks.group import Group
from fusewise.shape import Shape
from tests.ranks import run_ranks

WIDE = Shape(8, 64, "float32")


def _caught(kind: type[Exception], call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except kind as error:
        return str(error)
    return "nothing was raised"


def _faults(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    group = Group(timeout_s=20)
    found["gather"] = group.gather("values", {"rank": rank})
    found["broadcast"] = group.broadcast("value", rank + 7)
    found["no failure"] = group.vote("fine", None)
    found["vote"] = group.vote("build", RuntimeError("no memory") if rank else None)
    found["disagree"] = _caught(DisagreementError, group.agree, "plan", f"plan {rank}")
    found["out of step"] = _caught(RankError, group.barrier, f"step {rank}")

    group.unanimous("one cap", [0.25, None])
    found["one at fault"] = _caught(
        DisagreementError, group.unanimous, "full", 1, "no profile" if rank else None
    )
    apart = Group(timeout_s=0.2)
    if rank == 0:
        found["late"] = _caught(DisagreementError, apart.unanimous, "a cap", 1)
    group.barrier("rank 0 gave up")
    if rank == 1:
        found["late"] = _caught(DisagreementError, apart.unanimous, "a cap", 1)

    store = _get_process_group_store(group.process_group)
    usual, began = store.timeout, time.monotonic()
    with apart.bounded_store():
        found["a provider's wait"] = _caught(RuntimeError, store.get, "what no rank says")
    found["a provider waited_s"] = time.monotonic() - began
    found["as before"] = store.timeout == usual

    huge = Shape(1, 2**42, "float32")
    found["no shared memory"] = _caught(WorkspaceError, shm.OneShot, Group(timeout_s=20), huge)
    found["left behind"] = [p.name for p in Path("/dev/shm").glob("fusewise*")]

    short = Group(timeout_s=1.0)
    ours = shm.OneShot(short, WIDE)
    late = Group(timeout_s=1.0)
    x = torch.ones(2, 64)
    if rank == 0:
        began = time.monotonic()
        found["shm timeout"] = _caught(RankTimeoutError, ours.all_reduce, x)
        found["shm dead"] = _caught(RuntimeError, ours.all_reduce, x)
        found["timeout"] = _caught(RankTimeoutError, late.barrier, "meet")
        found["waited_s"] = time.monotonic() - began
    Group(timeout_s=20).barrier("end")
    ours.close()
    ours.close()
    return found


@cache
def faults() -> list[dict[str, Any]]:
    return run_ranks(_faults, 2)


def test_the_control_channel_gathers_broadcasts_and_votes() -> None:
    for found in faults():
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["broadcast"] == 7
        assert found["no failure"] is None
        assert found["vote"] == "build: rank 1: RuntimeError: no memory"


def test_ranks_that_disagree_or_are_out_of_step_are_named_on_every_rank() -> None:
    for found in faults():
        assert "rank 0: plan 0; rank 1: plan 1" in found["disagree"]
        assert "{0: 'step 0', 1: 'step 1'}" in found["out of step"]


def test_all_ranks_go_ahead_or_none_also_when_one_comes_late() -> None:
    first, second = faults()
    assert first["one at fault"] == second["one at fault"]
    assert "rank 1: no profile" in first["one at fault"]
    assert first["late"] == second["late"]
    assert "no answer from ranks [1] within 0.2 s" in first["late"]


def test_a_full_shared_memory_is_an_error_on_every_rank_and_leaves_no_file() -> None:
    for found in faults():
        assert "rank 0: OSError" in found["no shared memory"]
        assert "--shm-size" in found["no shared memory"]
        assert found["left behind"] == []


def test_a_rank_that_does_not_come_is_named_within_the_bound() -> None:
    found = faults()[0]
    assert "rank 1 did not arrive" in found["shm timeout"]
    assert "is closed" in found["shm dead"]
    assert "no answer from [1]" in found["timeout"]
    assert 1.5 < found["waited_s"] < 15


def test_what_a_provider_awaits_over_torchs_store_is_bounded_too() -> None:
    for found in faults():
        assert "imeout" in found["a provider's wait"]
        assert found["a provider waited_s"] < 15  # torch's own bound is minutes
        assert found["as before"]
