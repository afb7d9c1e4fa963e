"""The native backends' host side without a GPU: what each call hands to the driver."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusewise.backends.base import select_variant
from fusewise.backends.native import backend as native_base
from fusewise.backends.native.calls import Lane
from fusewise.backends.native.fp8 import Fp8
from fusewise.backends.native.strategies import OneShot, TwoShot
from fusewise.backends.native.watchdog import REPLAY_TIMEOUT
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


def test_a_fused_call_hands_over_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = built(monkeypatch)
    x, residual, weight = rows(), rows(), rows(1).view(-1)
    norm, total = backend.all_reduce_rms_norm(x, residual, weight, 1e-5, 1.0)
    sent = driver.launches[0]
    assert (sent.x, sent.residual, sent.weight) == (
        x.data_ptr(), residual.data_ptr(), weight.data_ptr()
    )  # fmt: skip
    assert (sent.output.out, sent.residual_out) == (norm.data_ptr(), total.data_ptr())
    assert sent.eps == pytest.approx(1e-5) and sent.weight_bias == 1.0
    assert (sent.num_tokens, sent.row_vectors, sent.row_units) == (3, 256, 8)
    assert sent.inverse_hidden_size == 1 / 2048
    assert (sent.group.slots, list(sent.group.peers)[:2]) == (4096, [8192, 0])
    assert sent.group.timeout_ns == 5_000_000_000


def test_a_call_without_residual_sends_none_after_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = built(monkeypatch)
    backend.all_reduce_rms_norm(rows(), rows(), rows(1).view(-1), 1e-6)
    backend.all_reduce_rms_norm(rows(), None, rows(1).view(-1), 1e-6)
    assert driver.launches[0].residual != 0
    assert driver.launches[1].residual == 0
    assert len(backend._calls) == 1


def test_a_call_with_nonsense_leaves_nothing_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = built(monkeypatch)
    call = (rows(), None, rows(1).view(-1))
    backend.all_reduce_rms_norm(*call, 1e-6, 1.0)
    with pytest.raises(TypeError):
        backend.all_reduce_rms_norm(*call, 1e-2, "1.0")
    backend.all_reduce_rms_norm(*call, 1e-6, 1.0)
    sent = driver.launches[-1]
    assert (sent.eps, sent.weight_bias) == (pytest.approx(1e-6), 1.0)


def test_a_call_from_another_current_device_runs_on_the_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, driver = built(monkeypatch)
    entered: list[Any] = []

    @contextlib.contextmanager
    def device(index: Any) -> Iterator[None]:
        entered.append(index)
        before, driver.device = driver.device, index
        yield
        driver.device = before

    monkeypatch.setattr(torch.cuda, "device", device)
    driver.device = 3
    x, weight = rows(), rows(1).view(-1)
    sum_at = backend.all_reduce(x).data_ptr()
    norm, total = backend.all_reduce_rms_norm(x, None, weight, 1e-6)
    backend.all_reduce_rms_norm_into(norm, total, x, None, weight, 1e-6)
    assert entered == [None] * 3  # the group's, which is the CPU
    assert len(driver.launches) == 3
    assert driver.launches[0].output.out == sum_at
    assert {sent.residual_out for sent in driver.launches[1:]} == {total.data_ptr()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("known", [True, False])
def test_results_are_as_empty_like_makes_them(
    monkeypatch: pytest.MonkeyPatch, mode: Any, known: bool
) -> None:
    if not known:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    backend, _ = built(monkeypatch)
    run = backend.prepared("all_reduce_rms_norm", Shape(6, 2048))
    weight = rows(1).view(-1)
    with mode():
        for size in ((6, 2048), (2, 3, 2048), (1, 6, 2048)):
            x = torch.zeros(size, dtype=torch.bfloat16)
            like = torch.empty_like(x)
            for made in run(x, None, weight, 1e-6, 0.0):
                assert (made.shape, made.stride(), made.dtype, made.device) == (
                    like.shape, like.stride(), like.dtype, like.device
                )  # fmt: skip
                assert made.is_inference() == like.is_inference()
                assert not made.requires_grad


def test_a_plain_sum_writes_to_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = built(monkeypatch)
    x = rows()
    out = backend.all_reduce(x)
    assert driver.launches[0].output.out == out.data_ptr() != x.data_ptr()
    assert driver.loads[-1].output == "kSum"


@pytest.mark.parametrize(
    ("num_tokens", "grid"), [(1, 2), (132, 264), (133, 264), (528, 528), (529, 528)]
)
def test_no_more_blocks_than_fit_at_once(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, grid: int
) -> None:
    backend, driver = built(monkeypatch)
    backend.all_reduce(rows(num_tokens))
    assert driver.grids == [grid]


def test_two_shot_tells_the_kernel_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = built(monkeypatch, TwoShot, 4)
    backend.all_reduce(rows(5, 2880))
    sent = driver.launches[0]
    assert (sent.row_vectors, sent.shard_vectors, sent.shard_units) == (360, 90, 3)
    assert sent.rows_per_tile == 1


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


def test_misaligned_tensors_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = built(monkeypatch)
    flat = torch.zeros(3 * 2048 + 1, dtype=torch.bfloat16)
    x, aligned, weight = flat[1:].view(3, 2048), rows(), rows(1).view(-1)
    backend.all_reduce(x)
    for operands in ((x, aligned, weight), (aligned, x, weight), (aligned, None, flat[1:2049])):
        backend.all_reduce_rms_norm(*operands, 1e-6)
    assert len(driver.launches) == 4
    for sent in driver.launches:
        addresses = sent.x, sent.residual or 0, sent.weight or 0
        assert all(address % 16 == 0 for address in addresses)
        assert not set(addresses) & {x.data_ptr(), flat[1:2049].data_ptr()}


def test_a_prepared_call_takes_its_rows_in_any_number_of_dimensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, driver = built(monkeypatch)
    run = backend.prepared("all_reduce_rms_norm", Shape(6, 2048))
    x, weight = rows(6).view(2, 3, 2048), rows(1).view(-1)
    norm, total = run(x, x, weight, 1e-6, 0.0)
    assert norm.shape == total.shape == (2, 3, 2048)
    assert (driver.launches[0].num_tokens, driver.launches[0].x) == (6, x.data_ptr())
    assert backend.prepared("all_reduce", Shape(6, 2048))(x).shape == (2, 3, 2048)
    with pytest.raises(InputError, match="no multiple of 8"):
        backend.prepared("all_reduce", Shape(6, 2044))


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


def test_captured_calls_have_the_bound_of_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPLAY_TIMEOUT, "0.25")
    monkeypatch.setattr(Lane, "follow", lambda lane, stream, captured: None)
    backend, driver = built(monkeypatch)
    driver.stream = 7
    for captured in (False, True, True, False):
        driver.capturing = captured
        backend.all_reduce(rows())
    bounds = [sent.group.timeout_ns for sent in driver.launches]
    assert bounds == [5_000_000_000, 250_000_000, 250_000_000, 5_000_000_000]


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


@pytest.mark.parametrize("scaling", ["static", "token", "group"])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_fp8_outputs_are_of_their_shapes(
    monkeypatch: pytest.MonkeyPatch, scaling: Any, keep_norm: bool
) -> None:
    backend, driver = built(monkeypatch)
    scale = torch.ones(1) if scaling == "static" else None
    fp8 = Fp8(scaling, keep_norm)
    result = backend.all_reduce_rms_norm_fp8(
        rows(3, 2880), None, rows(1, 2880).view(-1), 1e-6, fp8, static_scale=scale
    )
    sent = driver.launches[0].output
    assert result.quantised.dtype == torch.float8_e4m3fn and result.quantised.shape == (3, 2880)
    assert (
        tuple(result.scales.shape) == {"static": (1,), "token": (3, 1), "group": (3, 23)}[scaling]
    )
    assert sent.quantised == result.quantised.data_ptr()
    assert sent.scales == result.scales.data_ptr()
    assert (sent.out != 0) is keep_norm is (result.norm is not None)


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
