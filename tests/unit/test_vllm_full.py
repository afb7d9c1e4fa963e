"""Full mode: which path a call takes, what stays in place, and how far the plan reaches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.bands import Band, Plan, Table
from fusewise.integrations.vllm_full import Router, choices_here, full_cap
from fusewise.kernels.norm import residual_rms_norm
from fusewise.node import Fingerprint
from fusewise.plan import derive
from fusewise.profile import PathRecord, Profile, Provenance, Sample
from fusewise.thresholds import VllmSettings

KIB, MIB = 2**10, 2**20
HIDDEN = 64
PATTERN = "kARResidualRMSNorm"
VLLM = VllmSettings(version="0.22.1", sm=90, world_size=2, multicast=False)


def _band(start: int, end: int | None, path: str) -> Band:
    return Band(start, end, path, "fuse", "measured")


def _plan() -> Plan:
    """FlashInfer below 1 KiB, ours below 4 KiB, unfused above; plain: ours from 2 KiB."""
    fused = (
        _band(0, KIB, "flashinfer.one_shot"),
        _band(KIB, 4 * KIB, "native.one_shot"),
        _band(4 * KIB, None, "nccl + rms_norm"),
    )
    plain = (_band(0, 2 * KIB, "custom"), _band(2 * KIB, None, "native.one_shot"))
    tables = (
        Table("all_reduce_rms_norm", HIDDEN, fused, 128, 8 * KIB),
        Table("all_reduce", HIDDEN, plain, 128, 8 * KIB),
    )
    return Plan("bfloat16", "flashinfer.one_shot", tables, "test")


class _Ours:
    """Two ranks with equal tensors, without any rank."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append("all_reduce")
        return x * 2

    def all_reduce_rms_norm(
        self, x: Any, residual: Any, weight: Any, eps: float, bias: float
    ) -> Any:
        self.calls.append("all_reduce_rms_norm")
        return residual_rms_norm(x * 2, residual, weight, eps, bias)


class _World:
    def __init__(self) -> None:
        self.ours = _Ours()
        self.originals: list[dict[str, Any]] = []
        self.plains: list[torch.Tensor] = []
        self.router = Router(self.ours, _plan(), self.plain, PATTERN)  # type: ignore[arg-type]

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        self.plains.append(x)
        return x * 2

    def original(self, **kwargs: Any) -> str:
        self.originals.append(kwargs)
        return "original"


@pytest.fixture
def world() -> _World:
    return _World()


def _call(num_tokens: int, **changes: Any) -> dict[str, Any]:
    """vLLM's own call: the norm goes into the input, the sum into the residual."""
    generator = torch.Generator().manual_seed(num_tokens)
    x, residual = (
        torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16) for _ in range(2)
    )
    weight = torch.randn(HIDDEN, generator=generator).to(torch.bfloat16)
    return {
        "input": x, "workspace": SimpleNamespace(backend="trtllm"), "pattern": PATTERN,
        "launch_with_pdl": True, "output": None, "residual_out": residual, "norm_out": x,
        "quant_out": None, "scale_out": None, "residual_in": residual, "rms_gamma": weight,
        "rms_eps": 1e-6, "scale_factor": None, "layout_code": None, "use_oneshot": True,
        "fp32_acc": True, "trigger_completion_at_end": True, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_tokens", "runs"),
    [(7, "original"), (8, "ours"), (31, "ours"), (32, "plain"), (64, "plain")],
)
def test_each_size_runs_the_plans_path(world: _World, num_tokens: int, runs: str) -> None:
    call = _call(num_tokens)
    world.router.fused(world.original, **call)
    ran = {
        "original": len(world.originals), "ours": len(world.ours.calls), "plain": len(world.plains)
    }  # fmt: skip
    assert ran == {"original": 0, "ours": 0, "plain": 0} | {runs: 1}


@pytest.mark.parametrize("num_tokens", [16, 64])
@pytest.mark.parametrize("bias", [None, 1.0])
def test_results_replace_the_inputs_in_place(
    world: _World, num_tokens: int, bias: float | None
) -> None:
    call = _call(num_tokens, **({} if bias is None else {"weight_bias": bias}))
    x, residual = call["input"].clone(), call["residual_in"].clone()
    norm, total = residual_rms_norm(x * 2, residual, call["rms_gamma"], 1e-6, bias or 0.0)
    assert world.router.fused(world.original, **call) is call["input"]
    assert torch.equal(call["input"], norm)
    assert torch.equal(call["residual_in"], total)


def test_separate_outputs_leave_the_inputs_alone(world: _World) -> None:
    """vLLM's variant without residual: the sum goes into the input, the norm elsewhere."""
    call = _call(16)
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
        {"input": torch.zeros(16, HIDDEN)},
        {"input": torch.zeros(2, 8, HIDDEN, dtype=torch.bfloat16)},
        {"input": torch.zeros(HIDDEN, 16, dtype=torch.bfloat16).t()},
    ],
    ids=lambda changes: f"{next(iter(changes))}",
)
def test_what_is_not_covered_goes_to_the_original(world: _World, changes: dict[str, Any]) -> None:
    call = _call(16, **changes)
    assert world.router.fused(world.original, **call) == "original"
    assert world.originals[0].keys() == call.keys()
    assert not world.ours.calls


def test_plain_all_reduce_runs_ours_where_the_plan_says(world: _World) -> None:
    small, large = (torch.ones(t, HIDDEN, dtype=torch.bfloat16) for t in (15, 16))
    assert torch.equal(world.router.all_reduce(small), small * 2)
    assert (len(world.plains), world.ours.calls) == (1, [])
    assert torch.equal(world.router.all_reduce(large), large * 2)
    assert (len(world.plains), world.ours.calls) == (1, ["all_reduce"])
    world.router.all_reduce(torch.ones(64, HIDDEN))
    assert len(world.plains) == 2


def _profile(native: bool) -> Profile:
    times = {  # bytes → fused by vLLM, custom, nccl, native
        1 * MIB: (7.3, 12.0, 6.0, 5.7),
        8 * MIB: (50.0, 39.0, 41.0, 27.0),
        64 * MIB: (387.0, 300.0, 282.0, 290.0),
    }
    samples = []
    for size, (fused, custom, nccl, ours) in times.items():
        flash = "flashinfer.one_shot" if size <= 32 * MIB else "flashinfer.two_shot"
        row = {flash: fused, "custom + rms_norm": custom, "nccl + rms_norm": nccl}
        row |= {"native.one_shot": ours} if native else {}
        samples += [
            Sample(path=p, num_tokens=size // 4096, hidden_size=2048, times_us=(t,) * 3)
            for p, t in row.items()
        ]
        samples.append(
            Sample(op="all_reduce", path="nccl", num_tokens=size // 4096, hidden_size=2048,
                   times_us=(nccl,) * 3)
        )  # fmt: skip
    names = sorted({s.path for s in samples if s.op != "all_reduce"})
    return Profile(
        provenance=Provenance(origin="measured", source="test", created="2026-01-01", fusewise="0"),
        fingerprint=Fingerprint(
            device_type="cuda", device="NVIDIA H200", sm=90, world_size=2, fabric="nv18"
        ),
        dtype="bfloat16",
        baseline="nccl + rms_norm",
        paths=tuple(PathRecord(name=n, provider="t", fused="norm" not in n) for n in names),
        samples=tuple(samples),
    )


def test_only_all_reduces_this_vllm_would_run_are_choices() -> None:
    kept = choices_here(_profile(native=True), VLLM)
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
    cap = full_cap(_profile(native=True), VLLM, 2048)
    assert cap is not None
    assert 8 * MIB <= cap < 64 * MIB
    assert full_cap(_profile(native=True), VLLM, None) == cap
    assert full_cap(_profile(native=False), VLLM, 2048) is None
    assert full_cap(None, VLLM, 2048) is None


def test_full_cap_stays_within_flashinfers_workspace() -> None:
    profile = _profile(native=True)
    eight = profile.model_copy(
        update={"fingerprint": profile.fingerprint.model_copy(update={"world_size": 8})}
    )
    settings = VllmSettings(version="0.22.1", sm=90, world_size=8, multicast=False)
    assert full_cap(eight, settings, 2048) == 8 * MIB
