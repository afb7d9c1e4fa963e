"""The communicator on real CPU ranks, against a float64 reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusewise import Communicator
from fusewise.errors import (
    FusewiseError,
    InputError,
    RankTimeoutError,
    UnavailableError,
)
from fusewise.operation import ALL_REDUCE_RMS_NORM
from fusewise.tune.operands import normals
from tests.nodes import GLOO, node_profile, rows_of_64
from tests.ranks import run_ranks

SHAPES = [(1, 64), (3, 64), (17, 2880), (40, 4096), (5, 3584), (1, 8), (131, 200)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    exact = ALL_REDUCE_RMS_NORM.reference(inputs, residual, weight, 1e-5, bias)
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


def _after_a_death(comm: Communicator, x: torch.Tensor) -> str:
    """What a call says that runs elsewhere, once the watchdog told of a backend of its group."""
    backend: Any = comm._paths.backends["gloo"]
    error = RankTimeoutError("a kernel waited in vain")

    def check() -> None:
        raise error

    comm.all_reduce(x)
    backend.check = check
    comm._runs.die(error)
    try:
        comm.all_reduce(x)
    except RankTimeoutError as raised:
        return str(raised)
    finally:
        del backend.check
        comm._runs._dead = False
    return "nothing"


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
    found["dead"] = _after_a_death(comm, x)
    found["beyond"] = comm.decide("all_reduce_rms_norm", rows_of_64(1_000_000)).path
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


@cache
def behaviour() -> list[dict[str, Any]]:
    return run_ranks(_behaviour, 2)


def test_ranks_hold_the_same_bits() -> None:
    first, second = (found["bits"] for found in behaviour())
    assert first == second


@pytest.mark.parametrize("what", ["keeps x", "strided", "misaligned"])
def test_awkward_inputs_are_reduced_right(what: str) -> None:
    assert all(found[what] for found in behaviour())


def test_leading_dimensions_and_empty_messages_keep_theirrows_of_64() -> None:
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


def test_after_a_death_calls_on_every_path_say_so() -> None:
    assert [found["dead"] for found in behaviour()] == ["a kernel waited in vain"] * 2


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
    comm.all_reduce_rms_norm(x, x, weight)  # what it remembers must not let one through
    wrong["weight"] = (x, x, None)
    found = {}
    for name, arguments in wrong.items():
        try:
            comm.all_reduce_rms_norm(*arguments)
        except InputError as error:
            found[name] = str(error)
    comm.all_reduce_rms_norm(x, x, weight)  # nor does a refusal spoil the call that was right
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
        "weight dtype", "weight", "gradient", "backend", "profile", "bound",
    }  # fmt: skip
    assert first == second
    assert "expected torch.float32 of shape (64,), got torch.float16" in first["weight dtype"]
    assert "native.one_shot" in first["backend"]
