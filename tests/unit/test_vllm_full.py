"""Full mode: which path a call takes, what stays in place, and how far the plan reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewise.backends.norm import residual_rms_norm
from fusewise.engines.router import choices_here, full_cap
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.errors import RankTimeoutError
from fusewise.profiles.bands import Plan, Table
from fusewise.profiles.plan import derive
from tests.vllm_fakes import HIDDEN, KIB, MIB, NARROW, World, band, fused_call, tp2_profile

VLLM = VllmSettings(version="0.22.1", sm=90, world_size=2, multicast=False)


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(
    ("num_tokens", "runs"),
    [(7, "original"), (8, "ours"), (31, "ours"), (32, "plain"), (64, "plain")],
)
def test_each_size_runs_the_plans_path(world: World, num_tokens: int, runs: str) -> None:
    call = fused_call(num_tokens)
    world.router.fused(world.original, **call)
    ran = {
        "original": len(world.originals), "ours": len(world.ours.calls), "plain": len(world.plains)
    }  # fmt: skip
    assert ran == {"original": 0, "ours": 0, "plain": 0} | {runs: 1}


@pytest.mark.parametrize("num_tokens", [16, 64])
@pytest.mark.parametrize("bias", [None, 1.0])
def test_results_replace_the_inputs_in_place(
    world: World, num_tokens: int, bias: float | None
) -> None:
    call = fused_call(num_tokens, **({} if bias is None else {"weight_bias": bias}))
    x, residual = call["input"].clone(), call["residual_in"].clone()
    norm, total = residual_rms_norm(x * 2, residual, call["rms_gamma"], 1e-6, bias or 0.0)
    assert world.router.fused(world.original, **call) is call["input"]
    assert torch.equal(call["input"], norm)
    assert torch.equal(call["residual_in"], total)


def test_separate_outputs_leave_the_inputs_alone(world: World) -> None:
    """vLLM's variant without residual: the sum goes into the input, the norm elsewhere."""
    call = fused_call(16)
    x, zeros = call["input"], torch.zeros_like(call["input"])
    before = x.clone()
    call |= {"residual_in": zeros, "norm_out": torch.empty_like(x), "residual_out": x}
    world.router.fused(world.original, **call)
    norm, total = residual_rms_norm(before * 2, zeros, call["rms_gamma"], 1e-6, 0.0)
    assert torch.equal(call["norm_out"], norm)
    assert torch.equal(x, total)
    assert not zeros.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "kARResidualRMSNormFP8Quant"},
        {"pattern": "kAllReduce"},
        {"quant_out": torch.zeros(1)},
        {"scale_out": torch.zeros(1)},
        {"output": torch.zeros(1)},
        {"residual_in": None},
        {"norm_out": None},
        {"residual_out": None},
        {"rms_gamma": None},
        {"rms_gamma": torch.ones(HIDDEN)},
        {"residual_in": torch.ones(16, HIDDEN)},
        {"residual_in": torch.ones(8, HIDDEN, dtype=torch.bfloat16)},
        {"input": torch.zeros(16, HIDDEN)},
        {"input": torch.zeros(2, 8, HIDDEN, dtype=torch.bfloat16)},
        {"input": torch.zeros(HIDDEN, 16, dtype=torch.bfloat16).t()},
    ],
    ids=lambda changes: f"{next(iter(changes))}",
)
def test_what_is_not_covered_goes_to_the_original(world: World, changes: dict[str, Any]) -> None:
    call = fused_call(16, **changes)
    assert world.router.fused(world.original, **call) == "original"
    assert world.originals[0].keys() == call.keys()
    assert not world.ours.calls


def test_plain_all_reduce_runs_ours_where_the_plan_says(world: World) -> None:
    small, large = (torch.ones(t, HIDDEN, dtype=torch.bfloat16) for t in (15, 16))
    assert torch.equal(world.router.all_reduce(small), small * 2)
    assert (len(world.plains), world.ours.calls) == (1, [])
    assert torch.equal(world.router.all_reduce(large), large * 2)
    assert (len(world.plains), world.ours.calls) == (1, ["all_reduce"])
    world.router.all_reduce(torch.ones(64, HIDDEN))
    assert len(world.plains) == 2


def test_only_all_reduces_this_vllm_would_run_are_choices() -> None:
    kept = choices_here(tp2_profile(native=True), VLLM)
    paths = {
        size: {s.path for s in kept.samples if s.num_tokens * 4096 == size}
        for size in (MIB, 8 * MIB)
    }
    assert paths[MIB] == {"flashinfer.one_shot", "custom + rms_norm", "native.one_shot"}
    assert paths[8 * MIB] == {
        "flashinfer.one_shot", "nccl + rms_norm", "nccl", "native.one_shot",
    }  # fmt: skip
    assert derive(kept).band_at("all_reduce_rms_norm", 2048, MIB).path == "native.one_shot"


def test_full_cap_ends_where_the_plan_stops_fusing() -> None:
    cap = full_cap(tp2_profile(native=True), VLLM, 2048)
    assert cap is not None
    assert 8 * MIB <= cap < 64 * MIB
    assert full_cap(tp2_profile(native=True), VLLM, None) == cap
    assert full_cap(tp2_profile(native=False), VLLM, 2048) is None
    assert full_cap(None, VLLM, 2048) is None


def test_full_cap_stays_within_flashinfers_workspace() -> None:
    profile = tp2_profile(native=True)
    eight = profile.model_copy(
        update={"fingerprint": profile.fingerprint.model_copy(update={"world_size": 8})}
    )
    settings = VllmSettings(version="0.22.1", sm=90, world_size=8, multicast=False)
    assert full_cap(eight, settings, 2048) == 8 * MIB


def test_the_narrow_cap_rules_where_our_kernel_refuses(world: World) -> None:
    """Up to there FlashInfer's kernel never loses; beyond, it is what `cap` took away."""
    world.ours.most_tokens = 12
    ran = []
    for num_tokens in (12, 13, NARROW // 128, NARROW // 128 + 1):
        before = len(world.originals), len(world.ours.calls), len(world.plains)
        world.router.fused(world.original, **fused_call(num_tokens))
        after = len(world.originals), len(world.ours.calls), len(world.plains)
        ran.append([now - then for now, then in zip(after, before, strict=True)])
    assert ran == [[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]]
    large = torch.ones(17, HIDDEN, dtype=torch.bfloat16)
    assert torch.equal(world.router.all_reduce(large), large * 2)
    assert len(world.plains) == 2


@pytest.mark.parametrize(("variant", "selected"), [("v2", 1), ("gone", 0)])
def test_a_plan_may_name_a_variant_of_our_kernel(variant: str, selected: int) -> None:
    """A tune names the fastest launch of a kernel as a path; one that has gone runs as it is."""
    world = World()
    bands = (band(0, None, f"native.one_shot:{variant}"),)
    table = Table("all_reduce_rms_norm", HIDDEN, bands, 128, 8 * KIB)
    world.router.plan = Plan("bfloat16", "flashinfer.one_shot", (table,), "test")
    for _ in range(2):
        world.router.fused(world.original, **fused_call(16))
    assert world.ours.calls == ["in place", "in place"]
    assert world.ours.selected == [f"all_reduce_rms_norm 16 {variant}"] * selected


@pytest.mark.parametrize("name", ["input", "residual_in", "rms_gamma"])
def test_a_misaligned_tensor_costs_a_copy_and_not_the_kernel(world: World, name: str) -> None:
    """Ranks may differ in it, so it must not change what they run."""
    call, aligned = fused_call(16), fused_call(16)
    room = torch.empty(call[name].numel() + 1, dtype=torch.bfloat16)
    moved = room[1:].view(call[name].shape)
    moved.copy_(call[name])
    assert moved.data_ptr() % 16
    replaced = call[name]
    call = {key: moved if value is replaced else value for key, value in call.items()}
    world.router.fused(world.original, **call)
    world.router.fused(world.original, **aligned)
    assert world.ours.calls == ["copied", "in place"]
    assert torch.equal(call["norm_out"], aligned["norm_out"])
    assert torch.equal(call["residual_out"], aligned["residual_out"])


def test_a_dead_group_ends_the_worker_with_the_message(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    with caplog.at_level("CRITICAL", "vllm.plugins.fusewise"):
        world.ours.tell(RankTimeoutError("rank 0 waited at row 17 for rank 1"))
    assert ended == [RankTimeoutError.exit_code]
    assert "this worker ends: rank 0 waited at row 17 for rank 1" in caplog.text
