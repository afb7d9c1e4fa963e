"""The A/B benchmark's arithmetic: traces to kernel times, steps, quartiles, divergence."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "vllm_trace.py"


@pytest.fixture(scope="module")
def trace() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_trace", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(file: Path, kernels: list[tuple[str, float]]) -> Path:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": name, "dur": dur, "ts": 0} for name, dur in kernels
    ]
    events.append({"ph": "X", "cat": "cpu_op", "name": "vllm::all_reduce", "dur": 99.0})
    events.append({"ph": "M", "name": "process_name"})
    text = json.dumps({"traceEvents": events})
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<x>", 1),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>", 1),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 1),
        ("fusewise_one_shot", 1),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_1", 1),
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>", 1),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", 0),
        ("void at::native::vectorized_elementwise_kernel<4>", 0),
        ("fused_moe_kernel", 0),
    ],
)
def test_which_kernels_count(trace: ModuleType, name: str, counted: int) -> None:
    assert trace.belongs(name) is bool(counted)


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_kernel_time_is_summed_by_name(trace: ModuleType, tmp_path: Path, suffix: str) -> None:
    file = _write(tmp_path / f"t{suffix}", [("a_rms", 2.0), ("gemm", 5.0), ("a_rms", 3.0)])
    kernels = trace.read_kernels(file)
    assert kernels == {
        "a_rms": {"count": 2, "total_us": 5.0}, "gemm": {"count": 1, "total_us": 5.0}
    }  # fmt: skip
    assert trace.summary(kernels, steps=2) == {
        "total_us": 5.0,
        "all_reduce_norm_us": 2.5,
        "kernels": [{"name": "a_rms", "count": 1.0, "time_us": 2.5}],
    }


def test_a_trace_without_kernels_is_an_error(trace: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kernel"):
        trace.read_kernels(_write(tmp_path / "t.json", []))


def test_decode_steps_are_a_difference(trace: ModuleType) -> None:
    whole = {"a": {"count": 33, "total_us": 70.0}, "b": {"count": 2, "total_us": 4.0}}
    first = {"a": {"count": 1, "total_us": 6.0}, "only_first": {"count": 1, "total_us": 1.0}}
    assert trace.difference(whole, first) == {
        "a": {"count": 32, "total_us": 64.0}, "b": {"count": 2, "total_us": 4.0}
    }  # fmt: skip


def test_the_newest_trace_of_each_rank(trace: ModuleType, tmp_path: Path) -> None:
    for name, at in [("tp0_rank0.1.pt.trace.json.gz", 10), ("tp0_rank0.2.pt.trace.json.gz", 30),
                     ("tp1_rank1.1.pt.trace.json.gz", 20), ("other.json", 40)]:  # fmt: skip
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(at, at))
    found = trace.newest_by_rank(tmp_path, 5)
    assert {rank: file.name.split(".")[1] for rank, file in found.items()} == {0: "2", 1: "1"}
    assert sorted(trace.newest_by_rank(tmp_path, 20)) == [0]


def test_quartiles_and_divergence(trace: ModuleType) -> None:
    assert trace.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "min": 1.0, "p25": 2.0, "median": 3.0, "p75": 4.0, "rounds": 5
    }  # fmt: skip
    assert trace.first_divergence([[1, 2, 3], [4, 5]], [[1, 9, 9], [4, 5]]) == [1, None]
