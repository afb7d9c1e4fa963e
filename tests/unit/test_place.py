"""Where ranks run: one record for GPUs, shared GPUs and CPUs, whatever this machine has."""

from __future__ import annotations

import pytest

from fusewise.errors import InputError, UnavailableError
from fusewise.node import probe
from fusewise.ranks import place, teams
from fusewise.ranks.place import PLACES, SHARED_SWITCH, place_for, sharing


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, free_gib: float = 140.0) -> None:
    monkeypatch.setattr(place, "gpu_count", lambda: gpus)
    monkeypatch.setattr(place, "gpu_free_bytes", lambda: int(free_gib * 2**30))


def test_a_gpu_each_where_there_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 4)
    found = place_for(4, share=True)
    assert (found.kind, found.process_group) == ("cuda", "nccl")
    assert [found.device(rank) for rank in range(4)] == [f"cuda:{rank}" for rank in range(4)]
    assert found.environment == {}


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 2), (1, 8), (2, 8)])
def test_fewer_gpus_are_shared_evenly(
    monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int
) -> None:
    machine(monkeypatch, gpus)
    found = place_for(ranks, share=True)
    assert (found.kind, found.process_group) == ("shared", "gloo")
    assert [found.device(rank) for rank in range(ranks)] == [
        f"cuda:{rank % gpus}" for rank in range(ranks)
    ]
    assert found.environment == {SHARED_SWITCH: "1"}


def test_no_gpu_means_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0)
    found = place_for(3, share=True)
    assert (found.kind, found.device(2), found.environment) == ("cpu", "cpu", {})


def test_nobody_who_passed_nothing_is_told_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1)
    with pytest.raises(UnavailableError) as raised:
        teams.local_team(None)
    assert str(raised.value).startswith("an all-reduce needs two ranks; this node has one GPU. ")
    assert "`fusewise verify`" in str(raised.value)
    assert "got" not in str(raised.value)
    with pytest.raises(InputError, match=r"1 to 1 ranks, one per GPU, got 8.*fusewise verify"):
        teams.local_team(8)
    assert teams.local_team(None, share=True).place is PLACES["shared"]


def test_more_ranks_than_the_gpus_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1, free_gib=10.0)
    assert place_for(4, share=True).shared
    with pytest.raises(UnavailableError, match="too little free memory for 8 ranks"):
        place_for(8, share=True)
    with pytest.raises(InputError, match="1 to 8 ranks, sharing GPUs"):
        place_for(9, share=True)


def test_who_shares_is_read_from_the_devices_named() -> None:
    assert sharing(["a", "b", "a", None, None]) == ["a"]
    assert sharing([None, None]) == []


def test_a_shared_gpu_has_no_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"device": "X", "sm": 90, "fabric": "nv18", "multicast": True, "driver": "1"}
    monkeypatch.setattr("fusewise.node.gpu_facts", lambda: dict(facts))
    apart, shared = probe(2), probe(2, shared=True)
    assert (apart.kind, apart.fabric) == ("cuda", "nv18")
    assert (shared.kind, shared.fabric, shared.multicast) == ("shared", "shared", False)
    assert apart.differences(shared, ("fabric",))


def test_torchruns_variables_are_numbers_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(InputError, match="RANK is not what torchrun sets"):
        teams.torchrun_team(2, 1.0)
