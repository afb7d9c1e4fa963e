"""What the ranks of a group settle: profiles, backends, several groups, a peer that stays away."""

from __future__ import annotations

import logging
import os
import weakref
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusewise import Communicator
from fusewise.errors import (
    DisagreementError,
    FusewiseError,
    RankTimeoutError,
    UnavailableError,
)
from fusewise.profiles import store
from fusewise.profiles.bands import Plan
from fusewise.profiles.schema import Profile
from fusewise.ranks.group import Group
from tests.nodes import GLOO, SHM, node_profile, rows_of_64
from tests.ranks import run_ranks


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _profiles(rank: int) -> dict[str, Any]:
    log, lines = logging.getLogger("fusewise"), _Lines()
    log.addHandler(lines)
    found: dict[str, Any] = {}
    profile = node_profile()
    for name, mine in {"one without": profile if rank else None,
                       "different": node_profile(1.0 if rank else 50.0)}.items():  # fmt: skip
        try:
            Communicator(profile=mine)
        except DisagreementError as error:
            found[name] = str(error)
    other = profile.model_copy(
        update={"fingerprint": profile.fingerprint.model_copy(update={"world_size": 8})}
    )
    try:
        Communicator(profile=other)
    except FusewiseError as error:
        found["other node"] = str(error)
    # Only rank 0 finds a profile: the group takes it, so hit or miss is one decision.
    os.environ["FUSEWISE_HOME"] += str(rank)
    if rank == 0:
        store.save(profile)
    with Communicator() as comm:
        found["stored on rank 0"] = comm.plans["bfloat16"].digest
    with Communicator(without=["shm"], profile=profile) as comm:
        x = torch.randn(2, 64, dtype=torch.bfloat16)
        comm.all_reduce_rms_norm(x, None, x[0])
        found["without"] = sorted(comm._paths.backends)
        found["without path"] = comm.decide("all_reduce_rms_norm", rows_of_64(1)).path
    missing = profile.model_dump()
    for path in missing["paths"]:
        path["name"] = path["name"].replace(SHM, "custom")
    for sample in missing["samples"]:
        sample["path"] = sample["path"].replace(SHM, "custom")
    with Communicator(profile=Profile.model_validate(missing)) as comm:
        comm.all_reduce_rms_norm(x, None, x[0])
    comm = Communicator(profile=profile)
    plan = comm.plans["bfloat16"]
    found["round trip"] = Plan.from_dict(plan.to_dict()).digest == plan.digest
    found["lines"] = lines.lines
    return found


@cache
def profiles() -> list[dict[str, Any]]:
    return run_ranks(_profiles, 2)


@pytest.mark.parametrize("case", ["one without", "different"])
def test_ranks_with_different_profiles_are_named(case: str) -> None:
    for found in profiles():
        assert "ranks disagree at 'profile passed as argument'" in found[case]
        assert "rank 0: " in found[case]
        assert "rank 1: " in found[case]


def test_a_profile_of_another_node_is_refused() -> None:
    assert all("world_size: 8 in the profile, 2 here" in f["other node"] for f in profiles())


def test_the_group_decides_whether_a_stored_profile_was_hit() -> None:
    first, second = profiles()
    assert first["stored on rank 0"] == second["stored on rank 0"]
    assert first["round trip"]


def test_an_excluded_or_missing_backend_leaves_its_sizes_to_the_best_of_the_others() -> None:
    first, second = profiles()
    assert (first["without"], first["without path"]) == (["gloo"], GLOO)
    told = [line for line in first["lines"] if "disabled" in line]
    assert any("custom is disabled on all ranks" in line for line in told)
    assert len(told) == len(set(told))
    assert not [line for line in second["lines"] if "disabled" in line]


def _unheard(rank: int) -> dict[str, Any]:
    """Rank 1 stays away from a call; a profile names a backend that nobody has."""
    found: dict[str, Any] = {}
    strange = node_profile().model_dump()
    for path in strange["paths"]:
        path["name"] = path["name"].replace(SHM, "warp.drive")
    for sample in strange["samples"]:
        sample["path"] = sample["path"].replace(SHM, "warp.drive")
    with Communicator(profile=Profile.model_validate(strange), timeout_s=30) as comm:
        found["strange"] = comm.decide("all_reduce_rms_norm", rows_of_64(1)).path
    comm = Communicator(without=["shm"], timeout_s=2)
    if rank == 0:
        try:
            comm.all_reduce(torch.ones(2, 8))
        except RankTimeoutError as error:
            found["alone"] = str(error)
    Group(timeout_s=30).barrier("end")
    return found


def test_a_missing_peer_is_bounded_also_on_the_baseline() -> None:
    first, _ = run_ranks(_unheard, 2)
    assert "all ranks within 2 s" in first["alone"]
    assert first["strange"] == GLOO, "an unknown backend leaves its sizes to the others"


def _groups(rank: int) -> dict[str, Any]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    trio = dist.new_group([0, 1, 2])
    found: dict[str, Any] = {}
    with Communicator(pairs[rank // 2]) as comm:
        x = torch.full((2, 8), float(rank))
        found["pair"] = float(comm.all_reduce(x)[0, 0])
        if rank < 3:
            with Communicator(trio) as three:
                found["trio"] = float(three.all_reduce(x)[0, 0])
                found["both"] = float(comm.all_reduce(x)[0, 0]) if rank < 2 else None
        else:
            try:
                Communicator(trio)
            except UnavailableError as error:
                found["outsider"] = str(error)
    return found


def test_several_groups_in_one_job_keep_apart() -> None:
    found = run_ranks(_groups, 4)
    assert [f["pair"] for f in found] == [1.0, 1.0, 5.0, 5.0]
    assert [f["trio"] for f in found[:3]] == [3.0, 3.0, 3.0]
    assert [f["both"] for f in found[:2]] == [1.0, 1.0]
    assert "not a member" in found[3]["outsider"]


def _alone(rank: int) -> list[float]:
    with Communicator() as comm:
        x = torch.full((2, 8), 3.0)
        out, total = comm.all_reduce_rms_norm(x, None, torch.ones(8))
        same = total.data_ptr() == x.data_ptr()
        return [float(out[0, 0]), float(total[0, 0]), float(comm.all_reduce(x)[0, 0]), float(same)]


def test_a_group_of_one_only_normalises() -> None:
    ((out, total, summed, aliased),) = run_ranks(_alone, 1)
    assert (round(out, 5), total, summed, aliased) == (1.0, 3.0, 3.0, 0.0)


def test_without_a_process_group_the_error_says_what_to_call() -> None:
    with pytest.raises(UnavailableError, match="init_process_group"):
        Communicator()


def _destroyed(rank: int, callers_own: bool) -> list[str]:
    """Whether torch's group outlives its destruction, and what is said to those who go on."""
    made = dist.new_group([0, 1])
    kept = weakref.ref(made)
    group = Group(made, timeout_s=20.0) if callers_own else made
    comm = Communicator(group)
    other = Communicator(group)
    x = torch.ones(4, 64)
    assert torch.equal(comm.all_reduce(x), x * 2)
    comm.close()
    comm.close()
    assert torch.equal(other.all_reduce(x), x * 2), "a closed one left the group alone"
    dist.destroy_process_group(made)
    del made
    if not callers_own:
        del group
    said = "nothing"
    try:
        other.all_reduce(x)
    except UnavailableError as error:
        said = str(error)
    other.close()
    other.close()
    return ["gone" if kept() is None else "kept", said]


@pytest.mark.parametrize("callers_own", [False, True])
def test_no_communicator_keeps_torchs_group_from_its_end(callers_own: bool) -> None:
    # One kept until the interpreter ends aborts the process there: gloo's threads are still up.
    for state, said in run_ranks(_destroyed, 2, callers_own):
        assert state == "gone"
        assert "its process group was destroyed" in said
