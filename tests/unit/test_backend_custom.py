"""The custom all-reduce: eager, captured, registered, failed, closed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewise.backends import custom
from fusewise.errors import RankError, UnavailableError
from fusewise.shape import Shape
from tests.groups import MirrorGroup
from tests.provider_fakes import Fakes, check_reduces, rows

MAX = Shape(64, 2048, "bfloat16")  # 256 KiB


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    made.install(monkeypatch)
    monkeypatch.setattr(custom, "_all_linked", lambda uuids, rank: True)
    return made


def _custom() -> custom.Custom:
    return custom.Custom(MirrorGroup(), MAX)  # type: ignore[arg-type]


def test_custom_copies_when_eager(fakes: Fakes) -> None:
    backend = _custom()
    check_reduces(backend, rows(3))
    check_reduces(backend, rows(64))
    assert set(fakes.vllm.calls) == {(0x2000, 262144, 36)}, "rank 0's eager buffer"
    assert fakes.cudart.zeroed == [(0x1000, 4096 + 262144), (0x2000, 262144)]


def test_custom_reads_captured_tensors_in_place_and_registers_them(fakes: Fakes) -> None:
    backend = _custom()
    backend.capture_begin()
    check_reduces(backend, rows(2))  # the warm-up before a capture is eager
    fakes.vllm.capturing = True
    x, y = rows(4), rows(5)
    backend.all_reduce(x)
    backend.all_reduce(y)
    assert fakes.vllm.pending == [x.data_ptr(), y.data_ptr()]
    fakes.vllm.capturing = False
    backend.capture_end()
    ((handles, offsets),) = fakes.vllm.registered
    assert offsets == [[0, 16]] * 2 and handles == [[255, 2] * 64] * 2
    backend.capture_end()
    assert len(fakes.vllm.registered) == 1, "nothing new, nothing registered"


def test_custom_copies_in_a_capture_nobody_announced(fakes: Fakes) -> None:
    backend = _custom()
    fakes.vllm.capturing = True
    backend.all_reduce(rows(4))
    assert fakes.vllm.pending == [0x2000]
    slots = fakes.vllm.slots.view(torch.int64).view(-1, 8)
    expected = torch.tensor([*fakes.vllm.eager, 0, 0, 0, 0, 0, 0])
    assert slots.shape[0] == 2**17 and torch.equal(slots[-1], expected)


def test_custom_stops_before_its_slots_run_out(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom, "_SLOTS", 4)
    backend = _custom()
    fakes.vllm.capturing = True
    for _ in range(3):  # slot 0 is the eager buffer's
        backend.all_reduce(rows(1))
    with pytest.raises(UnavailableError, match="no slot left"):
        backend.all_reduce(rows(1))


def test_custom_is_out_of_use_after_a_failed_registration(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = _custom()

    def refuse(fa: int) -> Any:
        raise RuntimeError("invalid argument")

    monkeypatch.setattr(fakes.vllm, "get_graph_buffer_ipc_meta", refuse)
    with pytest.raises(UnavailableError, match=r"invalid argument.*expandable_segments"):
        backend.capture_end()
    assert "registration" in str(backend.admits(Shape(1, 2048)))
    with pytest.raises(UnavailableError, match="registration"):
        backend.all_reduce(rows(1))
    backend.capture_end()  # nothing more to do, nothing raised


def test_custom_names_ranks_that_captured_other_graphs(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = _custom()
    facts = [{"handles": "", "offsets": []}, {"handles": "00", "offsets": [0]}]
    mirrored = backend.group.gather
    monkeypatch.setattr(
        backend.group, "gather",
        lambda phase, value: facts if isinstance(value, dict) else mirrored(phase, value),
    )  # fmt: skip
    with pytest.raises(RankError, match="rank 0: 0, rank 1: 1"):
        backend.capture_end()
    assert backend.admits(Shape(1, 2048)) is not None


def test_custom_refuses_gpus_that_are_not_all_linked(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom, "_all_linked", lambda uuids, rank: False)
    _custom()  # two ranks need no NVLink
    assert fakes.vllm.linked is False
    before = list(fakes.cudart.live)
    with pytest.raises(UnavailableError, match="no NVLink between them"):
        custom.Custom(MirrorGroup(4), MAX)  # type: ignore[arg-type]
    assert fakes.cudart.live == before, "what the failed one allocated is free again"


def test_custom_frees_and_unmaps_once(fakes: Fakes) -> None:
    backend = _custom()
    assert len(fakes.cudart.live) == 2 and len(fakes.cudart.mapped) == 2
    backend.close()
    backend.close()
    assert (fakes.cudart.live, fakes.cudart.mapped, fakes.vllm.disposed) == ([], [], 1)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(64, 2048), None),
        (Shape(65, 2048), "has 262144"),
        (Shape(1, 8), None),
        (Shape(1, 9), "no multiple of 16"),
        (Shape(0, 8), "no multiple"),
        (Shape(1, 2048, "float16"), None),
    ],
)
def test_custom_limits(fakes: Fakes, shape: Shape, words: str | None) -> None:
    refused = _custom().admits(shape)
    assert refused is None if words is None else words in str(refused)
