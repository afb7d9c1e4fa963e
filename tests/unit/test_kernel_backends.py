"""The native backends' host side without a GPU: where they run, what they admit, how they end."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fusewise.backends.base import select_variant
from fusewise.backends.native import backend as native_base
from fusewise.backends.native.fp8 import Fp8
from fusewise.backends.native.strategies import OneShot, TwoShot
from fusewise.errors import InputError, RankTimeoutError, UnavailableError
from fusewise.node import Fingerprint
from fusewise.shape import Shape
from tests.groups import BOUND_S, MirrorGroup
from tests.native_driver import Driver, built, rows
from tests.unit.test_workspace import Host

pytest.importorskip("cuda.core", reason='needs pip install "fusewise[cuda]"')


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cpu", "sm": None, "fabric": "shm"}, "needs NVIDIA GPUs"),
        ({"sm": 75}, "needs sm_80 or newer, this is sm_75"),
        ({"world_size": 3}, "is written for 2, 4, 8 ranks, the group has 3"),
        ({"nodes": 2}, "several hosts"),
        ({"sm": 80}, None),
        ({}, None),
    ],
)
def test_where_one_shot_is_available(changes: dict[str, Any], reason: str | None) -> None:
    facts = {"device_type": "cuda", "device": "NVIDIA H200", "sm": 90, "world_size": 2}
    node = Fingerprint(**{**facts, "fabric": "nv18", **changes})
    found = OneShot.available(node)
    assert found is None if reason is None else found is not None and reason in found


def test_two_shot_needs_four_ranks_and_both_need_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts: dict[str, Any] = {"device_type": "cuda", "device": "x", "sm": 90, "fabric": "nv18"}
    two, four = Fingerprint(world_size=2, **facts), Fingerprint(world_size=4, **facts)
    assert TwoShot.available(two) == "is written for 4, 8 ranks, the group has 2"
    assert TwoShot.available(four) is None
    monkeypatch.setattr(native_base, "missing_compiler", lambda: "cuda.core is not installed")
    assert TwoShot.available(four) == "cuda.core is not installed"


def test_a_selected_variant_runs_for_its_operation_and_shape_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, driver = built(monkeypatch)
    backend.all_reduce(rows(3))
    backend.select("all_reduce", Shape(3, 2048), "v2")
    for x, vectors in ((rows(3), 2), (rows(4), 1)):
        backend.all_reduce(x)
        assert driver.loads[-1].vectors == vectors
    backend.all_reduce_rms_norm(rows(3), None, rows(1).view(-1), 1e-6)
    assert (driver.loads[-1].vectors, driver.loads[-1].output) == (1, "kNorm")
    backend.select("all_reduce", Shape(3, 2048), "")
    backend.all_reduce(rows(3))
    assert driver.loads[-1].vectors == 1


def test_a_path_names_the_variant_or_a_reason_why_the_default_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, driver = built(monkeypatch)
    shape, op = Shape(3, 2048), "all_reduce_rms_norm"
    reason = select_variant(backend, op, shape, "native.one_shot:v9")
    assert reason is not None and "no such variant" in reason
    assert select_variant(backend, op, shape, "native.one_shot") is None
    backend.all_reduce_rms_norm(rows(), None, rows(1).view(-1), 1e-6)
    assert not driver.loads[-1].early_trigger
    assert select_variant(backend, op, shape, "native.one_shot:early") is None
    backend.all_reduce_rms_norm(rows(), None, rows(1).view(-1), 1e-6)
    assert driver.loads[-1].early_trigger


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Shape(1024, 2048), None),
        (Shape(1024, 2044), "hidden size 2044 is no multiple of 8"),
        (Shape(0, 2048), "an empty message"),
        (Shape(2048, 2048), "needs 16384 slots of 512 bytes per peer, has 9217"),
        (Shape(1, 65536), None),
        (Shape(1, 65544), "rows of 131088 bytes, the kernel takes 131072"),
    ],
)
def test_what_one_shot_admits(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, reason: str | None
) -> None:
    backend, _ = built(monkeypatch)
    assert backend.admits(shape) == reason


def test_a_shape_that_is_not_admitted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = built(monkeypatch)
    with pytest.raises(InputError, match="needs 16384 slots"):
        backend.all_reduce(rows(2048))
    backend.reserve(Shape(2048, 2048))
    backend.all_reduce(rows(2048))
    assert len(driver.launches) == 1


@pytest.mark.parametrize(("world_size", "tokens"), [(4, 4096), (8, 1024)])
def test_one_shot_stops_where_staging_outgrows_it(
    monkeypatch: pytest.MonkeyPatch, world_size: int, tokens: int
) -> None:
    Host(monkeypatch, world_size)
    Driver(monkeypatch)
    backend = OneShot(MirrorGroup(world_size), Shape(16384, 2048))  # type: ignore[arg-type]
    assert backend.admits(Shape(tokens, 2048)) is None
    assert backend.admits(Shape(2 * tokens, 2048)) is not None


def test_two_shot_stops_where_a_row_outgrows_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Host(monkeypatch, 4)
    Driver(monkeypatch)
    widest = 4 * 256 * 32 * 8  # ranks, units, vectors, elements
    backend = TwoShot(MirrorGroup(4), Shape(2, widest))  # type: ignore[arg-type]
    assert backend.admits(Shape(1, widest)) is None
    found = backend.admits(Shape(1, widest + 8))
    assert found == "257 units of a rank's columns in a row, the kernel takes 256"


def test_after_a_time_out_every_call_says_who_was_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = built(monkeypatch)
    backend.all_reduce(rows())
    backend._workspace.status[:5] = torch.tensor([1, 0, 17, 1, 1], dtype=torch.int32)
    with pytest.raises(RankTimeoutError, match=r"rank 0 waited at row 17 for rank 1 \(phase 1\)"):
        backend.all_reduce(rows())


def test_a_time_out_of_a_replay_is_told_without_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = built(monkeypatch)
    heard = threading.Event()
    backend.on_death(lambda error: heard.set())
    backend._workspace.status[:5] = torch.tensor([1, 0, 17, 1, 1], dtype=torch.int32)
    assert heard.wait(BOUND_S)
    backend.close()


def test_a_refused_launch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver as bindings

    backend, driver = built(monkeypatch)
    driver.answer = bindings.CUresult.CUDA_ERROR_INVALID_VALUE
    backend._calls.clear()
    with pytest.raises(UnavailableError, match="CUDA_ERROR_INVALID_VALUE"):
        backend.all_reduce(rows())


def test_a_closed_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = built(monkeypatch)
    backend.all_reduce(rows())
    backend.close()
    backend.close()
    with pytest.raises(UnavailableError, match="closed"):
        backend.all_reduce(rows())


def test_fp8_in_the_kernel_needs_sm_89_and_everywhere_the_right_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for sm, output in ((80, "kNorm"), (89, "kTokenFp8")):
        backend, driver = built(monkeypatch, sm=sm)
        operands = rows(), None, rows(1).view(-1), 1e-6
        result = backend.all_reduce_rms_norm_fp8(*operands, Fp8("token"))
        assert driver.loads[-1].output == output
        assert (result.quantised.dtype, result.norm) == (torch.float8_e4m3fn, None)
        with pytest.raises(InputError, match="static_scale"):
            backend.all_reduce_rms_norm_fp8(*operands, Fp8("static"))
