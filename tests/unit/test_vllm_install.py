"""Full mode taking hold in a worker: which group, what is built, what it says when it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.errors import UnavailableError
from fusewise.integrations import vllm_full
from fusewise.integrations.vllm_full import install
from fusewise.thresholds import VllmSettings
from tests.vllm_fakes import MIB, Worker, fused_call, tp2_profile

FULL = {"mode": "full", "cap_mb": 16.0}


def test_install_routes_the_tensor_parallel_group(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    install(worker.vllm, worker.config(FULL))
    ((group, profile, sizes),) = worker.built
    assert group == "group"
    assert {s.path for s in profile.samples} == {"native.one_shot"}  # vLLM runs all the others
    assert sizes == {"max_message_bytes": 16 * MIB, "max_hidden_size": 2048}
    assert len(worker.agreed) == 1
    assert worker.vllm.all_reduce.__self__.communicator.group.rank == 0
    assert worker.comm.allreduce_fusion(pattern="kAllReduce") == "flashinfer"
    call = {**fused_call(16), "input": torch.ones(256, 2048, dtype=torch.bfloat16)}
    call |= {"residual_in": torch.ones_like(call["input"]), "norm_out": call["input"]}
    call |= {"residual_out": call["residual_in"], "rms_gamma": call["input"][0].clone()}
    assert worker.comm.allreduce_fusion(**call) is call["input"]
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
    assert worker.built == []


def test_install_without_its_profile_or_seam_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, None)
    before = worker.comm.allreduce_fusion
    with pytest.raises(UnavailableError, match="profile has gone"):
        install(worker.vllm, worker.config(FULL))
    monkeypatch.setattr(vllm_full, "missing", lambda seams: ["flashinfer_comm: not found"])
    with pytest.raises(UnavailableError, match="moved a seam"):
        install(worker.vllm, worker.config(FULL))
    assert worker.comm.allreduce_fusion is before


def test_install_without_a_native_kernel_gives_back_what_it_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True), builds=False)
    before = worker.comm.allreduce_fusion, worker.vllm.all_reduce
    with pytest.raises(UnavailableError, match="no native kernel could be built"):
        install(worker.vllm, worker.config(FULL))
    assert worker.ours.calls == ["close"]
    assert (worker.comm.allreduce_fusion, worker.vllm.all_reduce) == before
    assert not worker.vllm.fi_ar_comm.disabled


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
    vllm_full._silence_plain_flashinfer(theirs, blackwell)
    assert not theirs.fi_ar_comm.disabled
    vllm_full._silence_plain_flashinfer(SimpleNamespace(fi_ar_comm=None), blackwell)
