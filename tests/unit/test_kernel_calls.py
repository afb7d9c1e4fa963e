"""The native backends' calls without a GPU: what each hands to the driver and returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusewise.backends.native.calls import Lane
from fusewise.backends.native.fp8 import Fp8
from fusewise.backends.native.strategies import TwoShot
from fusewise.backends.native.watchdog import REPLAY_TIMEOUT
from fusewise.errors import InputError
from fusewise.shape import Shape
from tests.native_driver import built, rows

pytest.importorskip("cuda.core", reason='needs pip install "fusewise[cuda]"')


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
