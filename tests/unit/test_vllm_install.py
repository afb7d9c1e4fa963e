"""Full mode taking hold in a worker: what is built and set, and what rules when it cannot."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.engines.vllm import takeover as vllm_worker
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.engines.vllm.mark import Mark
from fusewise.engines.vllm.takeover import install
from fusewise.errors import FusewiseError
from fusewise.operation import variant_path
from fusewise.profiles.schema import Profile
from fusewise.shape import Shape
from tests.groups import StoreRanks
from tests.vllm_fakes import Worker, fused_call, tp2_profile

FULL = Mark("full", cap_mb=4.0, wide_mb=16.0, fuses=True)


def wide_call() -> dict[str, Any]:
    """1 MiB at the profile's hidden size, where it names ours."""
    x = torch.ones(256, 2048, dtype=torch.bfloat16)
    residual = torch.ones_like(x)
    return {**fused_call(16), "input": x, "norm_out": x, "rms_gamma": x[0].clone(),
            "residual_in": residual, "residual_out": residual}  # fmt: skip


def test_install_routes_the_tensor_parallel_group(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, call = Worker(monkeypatch, tp2_profile(native=True)), wide_call()
    install(worker.vllm, worker.config(), FULL)
    assert worker.asked == [("native.one_shot", Shape(4096, 2048))]  # 16 MiB of such rows
    assert worker.comm.allreduce_fusion(pattern="kAllReduce") == "flashinfer"
    assert worker.comm.allreduce_fusion(**call) is call["input"]
    assert worker.ours.calls == ["in place"]
    assert worker.vllm.all_reduce(call["input"]) == "vllm"  # nothing of ours measured for it


def test_the_wide_cap_comes_with_full_mode_and_keeps_the_users_endpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    config = worker.config()
    install(worker.vllm, config, Mark("full", 4.0, 16.0, fuses=True, endpoints=[100]))
    assert config.compilation_config.pass_config.fi_allreduce_fusion_max_size_mb == 16.0
    assert config.compilation_config.compile_ranges_endpoints == [100, 4096, 8192]


def test_a_narrow_cap_of_nothing_widens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    config = worker.config()
    config.compilation_config.pass_config.fuse_allreduce_rms = False
    install(worker.vllm, config, Mark("full", 0.0, 16.0, fuses=True))
    assert config.compilation_config.pass_config.fuse_allreduce_rms


def test_without_a_wide_cap_only_the_calls_are_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised model: patterns we do not cover would be fused up to there as well."""
    worker, call = Worker(monkeypatch, tp2_profile(native=True)), wide_call()
    config = worker.config()
    install(worker.vllm, config, Mark("full", 4.0, None, fuses=True))
    assert config.compilation_config.pass_config.fi_allreduce_fusion_max_size_mb == 4.0
    assert config.compilation_config.compile_ranges_endpoints == [1024, 8192]
    worker.comm.allreduce_fusion(**call)
    assert worker.ours.calls == ["in place"]


def test_install_leaves_other_modes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    before = worker.comm.allreduce_fusion, worker.vllm.all_reduce
    install(worker.vllm, worker.config(), Mark("cap", 8.0, fuses=True))
    assert (worker.comm.allreduce_fusion, worker.vllm.all_reduce) == before
    assert worker.asked == []


@pytest.mark.parametrize(
    ("changes", "profile", "words", "closed"),
    [
        ({}, False, "profile has gone", []),
        ({"builds": False}, True, "no native kernel could be built.*no compiler", []),
        ({"refuses": "full mode"}, True, "go ahead with full mode", []),
        ({"refuses": "full mode's plan"}, True, "full mode's plan", ["close"]),
    ],
)
def test_install_that_cannot_says_why_and_leaves_the_narrow_cap(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    profile: bool,
    words: str,
    closed: list[str],
) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True) if profile else None, **changes)
    before, config = (worker.comm.allreduce_fusion, worker.vllm.all_reduce), worker.config()
    with pytest.raises(FusewiseError, match=words):
        install(worker.vllm, config, FULL)
    assert (worker.comm.allreduce_fusion, worker.vllm.all_reduce) == before
    assert worker.ours.calls == closed
    assert not worker.vllm.fi_ar_comm.disabled
    assert config.compilation_config.pass_config.fi_allreduce_fusion_max_size_mb == 4.0
    assert config.compilation_config.compile_ranges_endpoints == [1024, 8192]


def test_ranks_compare_profile_plan_and_vllms_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for environ in ({}, {"VLLM_USE_NCCL_SYMM_MEM": "1"}):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        worker = Worker(monkeypatch, tp2_profile(native=True))
        install(worker.vllm, worker.config(), FULL)
        said.append(worker.said["full mode"])
    assert said[0][:2] == said[1][:2]
    assert "nccl_symm_mem=False" in said[0][2]
    assert "nccl_symm_mem=True" in said[1][2]


def test_a_rank_whose_profile_has_gone_keeps_full_mode_from_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks, of which the second finds no profile any more: both stay with the narrow cap."""
    worker, ranks = Worker(monkeypatch, tp2_profile(native=True)), StoreRanks(2)
    has: dict[Any, Profile | None] = {0: tp2_profile(native=True), 1: None}
    monkeypatch.setattr("fusewise.ranks.group.Group", lambda group, timeout_s=1: group)
    monkeypatch.setattr(
        "fusewise.ranks.agreement.fingerprint_of", lambda group: SimpleNamespace(rank=group.rank)
    )
    monkeypatch.setattr(
        vllm_worker, "_side", lambda node, config: side(has[node.rank]) if node else None
    )
    configs = {rank: worker.config() for rank in has}

    def side(profile: Profile | None) -> Any:
        if profile is None:
            raise FusewiseError("full mode is off: the profile has gone")
        return SimpleNamespace(proposal=["a test"], profile=profile)

    def ask(group: Any) -> None:
        theirs = SimpleNamespace(device_group=group)
        install(theirs, configs[group.rank], FULL)

    ranks.come(0, 1, ask=ask)
    assert len(ranks.ended) == 2
    for rank, words in ranks.ended.items():
        assert "rank 1: FusewiseError: full mode is off: the profile has gone" in words
        passes = configs[rank].compilation_config.pass_config
        assert passes.fi_allreduce_fusion_max_size_mb == 4.0
    assert worker.asked == []


def test_a_second_engine_in_a_process_has_its_own_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's function is wrapped once; which router it asks, the running engine says."""
    first = Worker(monkeypatch, tp2_profile(native=True))
    install(first.vllm, first.config(), FULL)
    second = Worker(monkeypatch, tp2_profile(native=True))
    second.comm = first.comm  # there is one FlashInfer in a process
    monkeypatch.setattr("flashinfer.comm", first.comm)
    monkeypatch.setitem(sys.modules, "flashinfer.comm", first.comm)
    install(second.vllm, second.config(), FULL)
    first.comm.allreduce_fusion(**wide_call())
    assert (first.ours.calls, second.ours.calls) == ([], ["in place"])


def test_an_engine_that_ends_takes_our_kernels_along(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    install(worker.vllm, worker.config(), FULL)
    worker.vllm.destroy()
    assert (worker.ours.calls, worker.destroyed) == (["close"], ["vllm"])
    assert worker.comm.allreduce_fusion(**wide_call()) == "flashinfer"


def test_an_engine_that_begins_forgets_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    install(worker.vllm, worker.config(), FULL)
    vllm_worker.release()
    assert worker.comm.allreduce_fusion(**wide_call()) == "flashinfer"


def test_variants_share_the_kernel_they_are_variants_of(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tp2_profile(native=True)
    native = profile.path("native.one_shot")
    variant = native.model_copy(update={"name": variant_path("native.one_shot", "v2")})
    worker = Worker(monkeypatch, profile.model_copy(update={"paths": (*profile.paths, variant)}))
    install(worker.vllm, worker.config(), FULL)
    assert [path for path, _ in worker.asked] == ["native.one_shot"]


def test_a_moved_seam_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True))
    monkeypatch.setattr(vllm_worker, "missing", lambda seams: ["flashinfer_comm: not found"])
    with pytest.raises(FusewiseError, match="moved a seam: got flashinfer_comm"):
        install(worker.vllm, worker.config(), FULL)


@pytest.mark.parametrize("version", ["0.22.1", "0.33.0", "0.34.0"])
def test_plain_flashinfer_steps_back_where_it_would_come_first(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    worker = Worker(monkeypatch, tp2_profile(native=True), version=version)
    install(worker.vllm, worker.config(), FULL)
    assert worker.vllm.fi_ar_comm.disabled


def test_plain_flashinfer_stays_where_vllm_sized_it_by_itself() -> None:
    blackwell = VllmSettings(version="0.33", sm=100, world_size=8, multicast=True)
    theirs = SimpleNamespace(fi_ar_comm=SimpleNamespace(disabled=False))
    vllm_worker._silence_plain_flashinfer(theirs, blackwell)
    assert not theirs.fi_ar_comm.disabled
    vllm_worker._silence_plain_flashinfer(SimpleNamespace(fi_ar_comm=None), blackwell)
