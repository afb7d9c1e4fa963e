"""Stand-ins for full mode: a plan, our communicator without ranks, vLLM's call and its worker."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.backends.norm import residual_rms_norm
from fusewise.engines.router import Router
from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm import takeover as vllm_worker
from fusewise.engines.vllm.mark import Mark
from fusewise.errors import DisagreementError, InputError
from fusewise.node import Fingerprint
from fusewise.profiles.bands import Band, Plan, Table
from fusewise.profiles.schema import PathRecord, Profile, Provenance, Sample
from fusewise.shape import Shape

KIB, MIB = 2**10, 2**20
HIDDEN = 64
NARROW = 2 * KIB  # within the band in which the plan names ours
PATTERN = "kARResidualRMSNorm"


def band(start: int, end: int | None, path: str) -> Band:
    return Band(start, end, path, "fuse", "measured")


def plan() -> Plan:
    """FlashInfer below 1 KiB, ours below 4 KiB, unfused above; plain: ours from 2 KiB."""
    fused = (
        band(0, KIB, "flashinfer.one_shot"),
        band(KIB, 4 * KIB, "native.one_shot"),
        band(4 * KIB, None, "nccl + rms_norm"),
    )
    plain = (band(0, 2 * KIB, "custom"), band(2 * KIB, None, "native.one_shot"))
    tables = (
        Table("all_reduce_rms_norm", HIDDEN, fused, 128, 8 * KIB),
        Table("all_reduce", HIDDEN, plain, 128, 8 * KIB),
    )
    return Plan("bfloat16", "flashinfer.one_shot", tables, "test")


class Ours:
    """A native kernel for two ranks with equal tensors, without any rank."""

    def __init__(self, most_tokens: int = 1024) -> None:
        self.calls: list[str] = []
        self.selected: list[str] = []
        self.most_tokens = most_tokens

    def admits(self, shape: Shape) -> str | None:
        return "too long" if shape.num_tokens > self.most_tokens else None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append("all_reduce")
        return x * 2

    def all_reduce_rms_norm(
        self, x: Any, residual: Any, weight: Any, eps: float, bias: float
    ) -> Any:
        self.calls.append("copied")
        return residual_rms_norm(x * 2, residual, weight, eps, bias)

    def all_reduce_rms_norm_into(
        self, norm: Any, total: Any, x: Any, residual: Any, weight: Any, eps: float, bias: float
    ) -> None:
        self.calls.append("in place")
        results = residual_rms_norm(x * 2, residual, weight, eps, bias)
        norm.copy_(results[0])
        total.copy_(results[1])

    def on_death(self, tell: Any) -> None:
        self.tell = tell

    def select(self, op: str, shape: Shape, variant: str) -> None:
        if variant == "gone":
            raise InputError("no such variant")
        self.selected.append(f"{op} {shape.num_tokens} {variant}")

    def close(self) -> None:
        self.calls.append("close")


class World:
    def __init__(self) -> None:
        self.ours = Ours()
        self.originals: list[dict[str, Any]] = []
        self.plains: list[torch.Tensor] = []
        native: Any = {"native.one_shot": self.ours}
        self.router = Router(native, plan(), self.plain, PATTERN, narrow_bytes=NARROW)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        self.plains.append(x)
        return x * 2

    def original(self, **kwargs: Any) -> str:
        self.originals.append(kwargs)
        return "original"


def fused_call(num_tokens: int, **changes: Any) -> dict[str, Any]:
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


def tp2_profile(native: bool) -> Profile:
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


class Worker:
    """What ``install`` meets in a worker: vLLM's communicator, FlashInfer, and one rank of ours."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        profile: Profile | None,
        *,
        version: str = "0.22.1",
        builds: bool = True,
        refuses: str = "",
    ) -> None:
        self.builds, self.refuses = builds, refuses
        self.said: dict[str, Any] = {}
        self.asked: list[tuple[str, Shape]] = []
        self.ours = Ours()
        self.comm = types.ModuleType("flashinfer.comm")
        self.comm.allreduce_fusion = lambda **kwargs: "flashinfer"  # type: ignore[attr-defined]
        self.comm.AllReduceFusionPattern = SimpleNamespace(  # type: ignore[attr-defined]
            kARResidualRMSNorm=PATTERN
        )
        package = types.ModuleType("flashinfer")
        package.comm = self.comm  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flashinfer", package)
        monkeypatch.setitem(sys.modules, "flashinfer.comm", self.comm)
        monkeypatch.setattr(vllm_worker, "missing", lambda seams: [])
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
        node = tp2_profile(native=True).fingerprint
        found = SimpleNamespace(profile=profile, where="a test")
        monkeypatch.setattr(vllm_worker, "find_profile", lambda node, dtype: found)
        group = SimpleNamespace(rank=0, unanimous=self.unanimous)
        monkeypatch.setattr("fusewise.ranks.group.Group", lambda process_group, timeout_s=1: group)
        monkeypatch.setattr("fusewise.ranks.agreement.fingerprint_of", lambda group: node)
        monkeypatch.setattr("fusewise.backends.steps.build_backend", self.build)
        self.vllm = SimpleNamespace(
            unique_name="tp:0",
            world_size=2,
            device_group="group",
            all_reduce=lambda x: "vllm",
            fi_ar_comm=SimpleNamespace(disabled=False),
            destroy=lambda: self.destroyed.append("vllm"),
        )
        self.destroyed: list[str] = []
        vllm_worker.release()

    def unanimous(self, phase: str, value: Any, fault: Any = None) -> None:
        """A peer refuses at the phase it was told to; this rank's own fault refuses too."""
        self.said[phase] = value
        if fault or phase == self.refuses:
            raise DisagreementError(f"not all ranks could go ahead with {phase}: {fault}")

    def build(self, path: str, group: Any, node: Fingerprint, largest: Shape) -> Any:
        self.asked.append((path, largest))
        return (self.ours, "") if self.builds else (None, "no compiler")

    def config(self) -> Any:
        """A worker's ``VllmConfig`` as the front end shipped it: the narrow cap is in force."""
        passes = SimpleNamespace(
            fi_allreduce_fusion_max_size_mb=4.0, fuse_allreduce_rms=True,
            flashinfer_max_size=lambda world_size: 4 * MIB,
        )  # fmt: skip
        compilation = SimpleNamespace(pass_config=passes, compile_ranges_endpoints=[1024, 8192])
        config = SimpleNamespace(
            compilation_config=compilation,
            parallel_config=SimpleNamespace(
                disable_custom_all_reduce=False, tensor_parallel_size=2
            ),
            model_config=SimpleNamespace(dtype=torch.bfloat16, get_hidden_size=lambda: 2048),
        )
        config._set_compile_ranges = lambda: self.ranges(config)
        return config

    def ranges(self, config: Any) -> None:
        """vLLM's: the user's endpoints and the cap's."""
        passes, compilation = config.compilation_config.pass_config, config.compilation_config
        tokens = int(passes.fi_allreduce_fusion_max_size_mb * MIB) // 4096
        kept = compilation.compile_ranges_endpoints or []
        compilation.compile_ranges_endpoints = sorted([*kept, tokens, 8192])


class Rank:
    """One worker's config and its process's table."""

    def __init__(self, mark: Mark | None, quantization: str | None = None) -> None:
        self.table: dict[int, float] = {2: 64}
        self.passes = SimpleNamespace(
            fuse_allreduce_rms=True, fi_allreduce_fusion_max_size_mb=None,
            flashinfer_max_size=lambda world_size: int(self.table[world_size] * MIB),
        )  # fmt: skip
        self.compilation = SimpleNamespace(
            pass_config=self.passes, compile_ranges_endpoints=[100, 8192]
        )
        self.config: Any = SimpleNamespace(
            compilation_config=self.compilation,
            parallel_config=SimpleNamespace(
                tensor_parallel_size=2, distributed_executor_backend="mp",
                disable_custom_all_reduce=False,
            ),
            model_config=SimpleNamespace(
                dtype=torch.bfloat16, get_hidden_size=lambda: 2048, quantization=quantization
            ),
            _set_compile_ranges=self._ranges,
        )  # fmt: skip
        if mark is not None:
            marks.write(self.config, mark)

    def _ranges(self) -> None:
        tokens = int((self.passes.fi_allreduce_fusion_max_size_mb or 64) * MIB) // 4096
        kept = self.compilation.compile_ranges_endpoints or []
        self.compilation.compile_ranges_endpoints = sorted([*kept, tokens, 8192])

    @property
    def state(self) -> tuple[float, float | None, list[int]]:
        """What stands in table, field and compile ranges."""
        field_mb = self.passes.fi_allreduce_fusion_max_size_mb
        return self.table[2], field_mb, self.compilation.compile_ranges_endpoints
