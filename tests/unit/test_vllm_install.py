"""Full mode taking hold in a worker: which group, what is built, what it says when it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.engines.vllm import takeover as vllm_worker
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.engines.vllm.takeover import install
from fusewise.errors import FusewiseError
from fusewise.shape import Shape
from tests.vllm_fakes import Worker, fused_call, tp2_profile

FULL = {"mode": "full", "cap_mb": 16.0}


def test_install_routes_the_tensor_parallel_group(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    install(worker.vllm, worker.config(FULL))
    assert worker.asked == [("native.one_shot", Shape(4096, 2048))]  # 16 MiB of such rows
    assert worker.comm.allreduce_fusion(pattern="kAllReduce") == "flashinfer"
    call = {**fused_call(16), "input": torch.ones(256, 2048, dtype=torch.bfloat16)}
    call |= {"residual_in": torch.ones_like(call["input"]), "norm_out": call["input"]}
    call |= {"residual_out": call["residual_in"], "rms_gamma": call["input"][0].clone()}
    assert worker.comm.allreduce_fusion(**call) is call["input"]
    assert worker.ours.calls == ["in place"]
    assert worker.vllm.all_reduce(call["input"]) == "vllm"  # nothing of ours measured for it


@pytest.mark.parametrize(
    ("name", "mark"),
    [("tp:0", None), ("tp:0", {"mode": "cap", "cap_mb": 8.0}), ("ep:0", FULL), ("etp:0", FULL)],
)
def test_install_leaves_other_groups_and_modes_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, mark: dict[str, Any] | None
) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    worker.vllm.unique_name = name
    before = worker.comm.allreduce_fusion, worker.vllm.all_reduce
    install(worker.vllm, worker.config(mark))
    assert (worker.comm.allreduce_fusion, worker.vllm.all_reduce) == before
    assert worker.asked == []


@pytest.mark.parametrize(
    ("changes", "profile", "words", "closed"),
    [
        ({}, False, "profile has gone", []),
        ({"builds": False}, True, "no native kernel could be built.*no compiler", []),
        ({"agrees": False}, True, "disagree", ["close"]),
    ],
)
def test_install_that_cannot_says_why_and_leaves_vllm_alone(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, bool],
    profile: bool,
    words: str,
    closed: list[str],
) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True) if profile else None, **changes)
    before = worker.comm.allreduce_fusion, worker.vllm.all_reduce
    with pytest.raises(FusewiseError, match=words):
        install(worker.vllm, worker.config(FULL))
    assert (worker.comm.allreduce_fusion, worker.vllm.all_reduce) == before
    assert worker.ours.calls == closed
    assert not worker.vllm.fi_ar_comm.disabled


def test_a_moved_seam_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    monkeypatch.setattr(vllm_worker, "missing", lambda seams: ["flashinfer_comm: not found"])
    with pytest.raises(FusewiseError, match="moved a seam: got flashinfer_comm"):
        install(worker.vllm, worker.config(FULL))


@pytest.mark.parametrize("version", ["0.22.1", "0.33.0"])
def test_plain_flashinfer_steps_back_where_it_would_come_first(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True), version=version)
    install(worker.vllm, worker.config(FULL))
    assert worker.vllm.fi_ar_comm.disabled


def test_plain_flashinfer_stays_where_vllm_sized_it_by_itself() -> None:
    blackwell = VllmSettings(version="0.33", sm=100, world_size=8, multicast=True)
    theirs = SimpleNamespace(fi_ar_comm=SimpleNamespace(disabled=False))
    vllm_worker._silence_plain_flashinfer(theirs, blackwell)
    assert not theirs.fi_ar_comm.disabled
    vllm_worker._silence_plain_flashinfer(SimpleNamespace(fi_ar_comm=None), blackwell)
