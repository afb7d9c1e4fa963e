"""The communicator on real CPU ranks, against a float64 reference."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusewise import Communicator, store
from fusewise.agreement import fingerprint_of
from fusewise.bands import Plan
from fusewise.errors import (
    DisagreementError,
    FusewiseError,
    InputError,
    RankTimeoutError,
    UnavailableError,
)
from fusewise.group import Group
from fusewise.profile import Profile
from fusewise.tuning.verify import normals, reference
from tests.ranks import run_ranks
from tests.samples import profile_of

SHM, GLOO = "shm.one_shot", "gloo + rms_norm"
SHAPES = [(1, 64), (3, 64), (17, 2880), (40, 4096), (5, 3584), (1, 8), (131, 200)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def node_profile(fused_us: float = 1.0) -> Profile:
    """A profile of this very node that prefers shm (or gloo, when shm is slow) up to 4 MiB."""
    mark = fingerprint_of(Group())
    medians = {t: {SHM: fused_us, GLOO: 5.0} for t in (1, 1024)}
    return profile_of(medians, node=mark, baseline=GLOO, spread=0.0)


def worst_error(
    comm: Communicator, rows: int, hidden: int, dtype: torch.dtype, **how: Any
) -> float:
    """The largest relative L2 error over both outputs, in units of the dtype's eps."""
    name = str(dtype).removeprefix("torch.")
    from fusewise.shape import Shape

    shape = Shape(rows, hidden, name)  # type: ignore[arg-type]
    inputs = [normals(shape, r, torch.device("cpu"), 3) for r in range(comm.group.world_size)]
    residual = normals(shape, 9, torch.device("cpu"), 3) if how.get("residual", True) else None
    weight = normals(Shape(1, hidden, name), 8, torch.device("cpu"), 3).view(-1)  # type: ignore[arg-type]
    bias = how.get("weight_bias", 0.0)
    got = comm.all_reduce_rms_norm(inputs[comm.group.rank], residual, weight, 1e-5, bias)
    exact = reference(inputs, residual, weight, 1e-5, bias)
    eps = torch.finfo(dtype).eps
    return max(
        float((g.double() - e).norm() / e.norm()) / eps for g, e in zip(got, exact, strict=True)
    )


def _numbers(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"errors": {}, "integers": []}
    for label, profile in (("shm", node_profile()), ("gloo", node_profile(50.0))):
        with Communicator(profile=profile) as comm:
            for rows, hidden in SHAPES:
                for dtype in DTYPES:
                    key = f"{label} {rows}x{hidden} {dtype}"
                    found["errors"][key] = worst_error(comm, rows, hidden, dtype)
            found["errors"][f"{label} bare"] = worst_error(comm, 3, 64, DTYPES[0], residual=False)
            found["errors"][f"{label} gemma"] = worst_error(comm, 3, 64, DTYPES[0], weight_bias=1.0)
            x = torch.arange(6 * 64).view(6, 64).to(torch.bfloat16) % 8 * (rank + 1)
            found["integers"].append(bool((comm.all_reduce(x) == x // (rank + 1) * 3).all()))
    return found


@cache
def numbers() -> list[dict[str, Any]]:
    return run_ranks(_numbers, 2)


def test_every_shape_and_dtype_is_within_an_eps_of_float64() -> None:
    for found in numbers():
        assert len(found["errors"]) == 2 * (len(SHAPES) * len(DTYPES) + 2)
        assert max(found["errors"].values()) < 1.0, found["errors"]


def test_sums_of_integers_are_exact() -> None:
    assert [found["integers"] for found in numbers()] == [[True, True]] * 2


def _behaviour(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    comm = Communicator(profile=node_profile())
    x = torch.randn(6, 64, dtype=torch.bfloat16)
    weight = torch.ones(64, dtype=torch.bfloat16)
    same = comm.all_reduce_rms_norm(x, x.clone().fill_(1.0), weight)
    found["bits"] = [t.view(torch.int16).tolist() for t in same]
    found["keeps x"] = not bool((comm.all_reduce(x) == x).all()) and x.shape == (6, 64)

    strided = torch.randn(64, 6, dtype=torch.bfloat16).T
    found["strided"] = bool((comm.all_reduce(strided) == comm.all_reduce(strided.clone())).all())
    flat = torch.randn(6 * 64 + 1, dtype=torch.bfloat16)[1:].view(6, 64)
    found["misaligned"] = bool((comm.all_reduce(flat) == comm.all_reduce(flat.clone())).all())
    deep = comm.all_reduce_rms_norm(x.view(2, 3, 64), None, weight)
    found["deep"] = [tuple(t.shape) for t in deep]
    empty = comm.all_reduce_rms_norm(x[:0], x[:0], weight)
    found["empty"] = [tuple(t.shape) for t in empty] + [tuple(comm.all_reduce(x[:0]).shape)]

    name = dist.group.WORLD.group_name
    ops = torch.ops.fusewise
    how = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(ops.all_reduce.default, (x, name), **how)
    arguments = (x, None, weight, 1e-6, 0.0, name)
    found["opcheck"] = torch.library.opcheck(ops.all_reduce_rms_norm.default, arguments, **how)
    found["beyond"] = comm.decide("all_reduce_rms_norm", _shape(1_000_000)).path
    comm.close()
    comm.close()
    for key, call in (
        ("unregistered", lambda: torch.ops.fusewise.all_reduce(x, name)),
        ("closed", lambda: comm.all_reduce(x)),
    ):
        try:
            call()
        except UnavailableError as error:
            found[key] = str(error)
    return found


def _shape(tokens: int) -> Any:
    from fusewise.shape import Shape

    return Shape(tokens, 64)


@cache
def behaviour() -> list[dict[str, Any]]:
    return run_ranks(_behaviour, 2)


def test_ranks_hold_the_same_bits() -> None:
    first, second = (found["bits"] for found in behaviour())
    assert first == second


@pytest.mark.parametrize("what", ["keeps x", "strided", "misaligned"])
def test_awkward_inputs_are_reduced_right(what: str) -> None:
    assert all(found[what] for found in behaviour())


def test_leading_dimensions_and_empty_messages_keep_their_shape() -> None:
    for found in behaviour():
        assert found["deep"] == [(2, 3, 64)] * 2
        assert found["empty"] == [(0, 64)] * 3


def test_the_torch_operators_keep_their_schemas_and_fakes() -> None:
    wanted = {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}
    assert [found["opcheck"] for found in behaviour()] == [wanted] * 2


def test_beyond_what_was_measured_the_baseline_runs() -> None:
    assert behaviour()[0]["beyond"] == GLOO


def test_an_operator_without_its_communicator_says_what_to_create() -> None:
    assert "Create fusewise.Communicator(group)" in behaviour()[0]["unregistered"]


def test_a_closed_communicator_says_so() -> None:
    assert all("this communicator is closed" in found["closed"] for found in behaviour())


def _refusals(rank: int) -> dict[str, str]:
    comm = Communicator()
    x, weight = torch.randn(2, 64), torch.ones(64)
    wrong: dict[str, tuple[Any, ...]] = {
        "dtype": (x.double(), None, weight),
        "device": (x.to("meta"), None, weight),
        "scalar": (x[0, 0], None, weight),
        "residual shape": (x, x[:1], weight),
        "residual dtype": (x, x.bfloat16(), weight),
        "weight shape": (x, None, weight[:8]),
        "weight dtype": (x, None, weight.half()),
        "gradient": (x.clone().requires_grad_(), None, weight),
    }
    found = {}
    for name, arguments in wrong.items():
        try:
            comm.all_reduce_rms_norm(*arguments)
        except InputError as error:
            found[name] = str(error)
    for name, keywords in {
        "backend": {"without": ["natvie"]},
        "profile": {"profile": "/no"},
        "bound": {"max_hidden_size": 0},
    }.items():
        try:
            Communicator(**keywords)  # type: ignore[arg-type]
        except FusewiseError as error:
            found[name] = str(error)
    return found


def test_bad_arguments_are_refused_on_every_rank_alike() -> None:
    first, second = run_ranks(_refusals, 2)
    assert set(first) == {
        "dtype", "device", "scalar", "residual shape", "residual dtype", "weight shape",
        "weight dtype", "gradient", "backend", "profile", "bound",
    }  # fmt: skip
    assert first == second
    assert "expected torch.float32 of shape (64,), got torch.float16" in first["weight dtype"]
    assert "native.one_shot" in first["backend"]


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
        found["without"] = sorted(comm._backends)
        found["without path"] = comm.decide("all_reduce_rms_norm", _shape(1)).path
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
        found["strange"] = comm.decide("all_reduce_rms_norm", _shape(1)).path
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
