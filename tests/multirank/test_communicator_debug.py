"""What a communicator says of itself, and FUSEWISE_DEBUG: ranks compare their calls."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any, Literal

import pytest
import torch

from fusewise import Communicator, Fp8, Shape
from fusewise.errors import FusewiseError
from tests.nodes import node_profile
from tests.ranks import run_ranks


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _error(call: Any) -> str:
    try:
        call()
    except FusewiseError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _said(rank: int) -> dict[str, Any]:
    heard = _Heard()
    logging.getLogger("fusewise").addHandler(heard)
    os.environ["FUSEWISE_HOME"] = "/nonexistent"
    found: dict[str, Any] = {}
    for _ in range(2):
        with Communicator() as bare:
            found["bare"] = repr(bare)
    found["warnings"] = [line for line in heard.lines if "no profile applies" in line]
    with Communicator(profile=node_profile()) as comm:
        found["repr"] = repr(comm)
        found["decide"] = _error(lambda: comm.decide("foo", Shape(1, 64)))  # type: ignore[arg-type]
        short = Shape(1, 64, "bf16")  # type: ignore[arg-type]
        found["short"] = comm.decide("all_reduce", short) == comm.decide("all_reduce", Shape(1, 64))

    os.environ["FUSEWISE_DEBUG"] = "1"
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    with Communicator(profile=node_profile()) as comm:
        found["shapes"] = _error(lambda: comm.all_reduce(x[: 4 - rank]))
        weight = torch.ones(64, dtype=torch.bfloat16)
        calls = (lambda: comm.all_reduce(x), lambda: comm.all_reduce_rms_norm(x, None, weight))
        found["operations"] = _error(calls[rank])
        found["eps"] = _error(lambda: comm.all_reduce_rms_norm(x, None, weight, eps=1e-5 * rank))
        norm = torch.ops.fusewise.all_reduce_rms_norm
        eps = 1e-5 * rank
        found["eps of operator"] = _error(lambda: norm(x, None, weight, eps, 0.0, comm.handle))
        scalings: tuple[Literal["group", "token"], ...] = "group", "token"
        fp8 = Fp8(scalings[rank])
        found["scaling"] = _error(lambda: comm.all_reduce_rms_norm(x, None, weight, fp8=fp8))
        found["right"] = bool((comm.all_reduce(x) == 2).all())
        found["operator"] = bool((torch.ops.fusewise.all_reduce(x, comm.handle) == 2).all())
        compiled = torch.compile(comm.all_reduce, backend="eager", fullgraph=True)
        found["compiled"] = bool((compiled(x) == 2).all())
    os.environ["FUSEWISE_DEBUG"] = str(1 - rank)
    found["one only"] = _error(lambda: Communicator(profile=node_profile()))
    os.environ["FUSEWISE_DEBUG"] = "yes"
    found["yes"] = _error(lambda: Communicator(profile=node_profile()))
    return found


@cache
def said() -> list[dict[str, Any]]:
    return run_ranks(_said, 2)


def test_one_warning_when_no_profile_applies_however_many_groups() -> None:
    first, second = said()
    assert len(first["warnings"]) == 1
    assert "Run `fusewise tune`" in first["warnings"][0]
    assert second["warnings"] == [], "the first rank speaks for all"


def test_its_repr_says_plan_and_source() -> None:
    for found in said():
        assert "the profile passed" in found["repr"]
        assert "bfloat16 plan " in found["repr"]
        assert "ranks [0, 1]" in found["repr"]
        assert found["bare"].endswith("no plan>")
    assert said()[0]["repr"] == said()[1]["repr"]


def test_an_unknown_operation_is_refused_and_a_short_dtype_understood() -> None:
    for found in said():
        assert found["decide"].startswith(
            "InputError: unknown operation: expected all_reduce_rms_norm or all_reduce, got 'foo'"
        )
        assert found["short"]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            "shapes",
            "rank 0: ['all_reduce', 'x=[4, 64] bfloat16']; rank 1: ['all_reduce', 'x=[3, 64]",
        ),
        (
            "operations",
            "rank 0: ['all_reduce', 'x=[4, 64] bfloat16']; rank 1: ['all_reduce_rms_norm'",
        ),
        ("eps", "eps=1e-05"),
        ("eps of operator", "eps=1e-05"),
        ("scaling", "fp8=Fp8(scaling='group'"),
        ("one only", "FUSEWISE_DEBUG"),
    ],
)
def test_calls_that_do_not_belong_together_are_named_on_every_rank(case: str, text: str) -> None:
    for found in said():
        assert found[case].startswith("DisagreementError"), found[case]
        assert text in found[case]


def test_what_agrees_runs_as_before() -> None:
    for found in said():
        assert found["right"] and found["operator"] and found["compiled"]
        assert found["yes"] == "InputError: FUSEWISE_DEBUG: expected 0 or 1, got 'yes'"
