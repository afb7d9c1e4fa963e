"""Real vLLM at TP2 on one GPU: unfused, its default, the lowered cap, our kernels, a broken rank.

The same tokens and log-probabilities in every arm, native kernels called inside vLLM's compiled
graph, two engines one after the other in a process. Correctness only: the ranks share the GPU.
All arms run at once, minutes together; vLLM itself and NCCL's stand-in are ``vllm_engine/``'s.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewise.node import probe
from fusewise.operation import is_unfused
from fusewise.profiles import store
from fusewise.ranks.place import SHARED_SWITCH

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs pip install vllm"),
    pytest.mark.skipif(
        importlib.util.find_spec("flashinfer") is None, reason="needs pip install flashinfer-python"
    ),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "vllm_engine"
CAP_BYTES = 2**18  # 64 tokens of hidden 2048 in bf16: what FlashInfer's kernel is good for
WIDE_BYTES = 2**20  # and ours, to a bit beyond 256 tokens: the longest prompt lies further
ARMS = {
    "nofuse": ("off", "1", "nofuse"),
    "default": ("off", "1", "fuse"),
    "cap": ("cap", "1", "fuse"),
    "full": ("full", "2", "fuse"),
    "broken": ("full", "1", "fuse"),
}
FUSED = ("default", "cap", "full", "broken")
MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048,
    "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENVIRONMENT = {
    SHARED_SWITCH: "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_DISABLE_PYNCCL": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}  # fmt: skip
# What four layers and a head of bf16 sums in another order move a log-probability by.
NOISE = 0.25


def _profile(home: Path) -> None:
    """A profile of this shared GPU: FlashInfer wins, beyond it ours, beyond that unfused paths.

    Its times are made up: it is there to make each mode take hold, in a folder of its own.
    """
    packaged = store.load("nvidia-h200-tp2")
    flashinfer = next(p for p in packaged.paths if p.name == "flashinfer.one_shot")
    native = flashinfer.model_copy(update={"name": "native.one_shot", "provider": "native"})
    samples = []
    for sample in packaged.samples:
        size = sample.num_tokens * sample.hidden_size * 2
        keeps = size <= CAP_BYTES or is_unfused(sample.path) or sample.op == "all_reduce"
        times_us = tuple(t * (1.0 if keeps else 20.0) for t in sample.times_us)
        samples.append(sample.model_copy(update={"times_us": times_us}))
        if sample.path == flashinfer.name:
            mine = tuple(t * (0.5 if size <= WIDE_BYTES else 20.0) for t in sample.times_us)
            update = {"times_us": mine, "path": native.name}
            samples.append(sample.model_copy(update=update))
    made = packaged.model_copy(
        update={
            "fingerprint": probe(2, device_type="cuda", shared=True),
            "paths": (*packaged.paths, native),
            "samples": tuple(samples),
        }
    )
    store.save(made, home / "profiles")


def _plugins(folder: Path) -> None:
    """Entry points without an installation: two dist-info folders on the path."""
    for name, entry in (
        ("one_gpu", "tests.gpu.vllm_engine.one_gpu:register"),
        ("fusewise", "fusewise.engines.vllm.plugin:register"),
    ):
        info = folder / f"{name}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {entry}\n")


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every arm's engines, log and counts of native calls; all arms at once on the one GPU."""
    folder = Path(os.environ.get("OUT") or tmp_path_factory.mktemp("vllm")) / "vllm_engine"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    _profile(folder / "home")
    _plugins(folder / "plugins")
    path = os.pathsep.join([str(folder / "plugins"), str(ROOT / "src"), str(ROOT), *sys.path])
    started = {arm: _start(arm, folder, path) for arm in ARMS}
    found = {}
    try:
        for arm, process in started.items():
            process.wait(timeout=380)
            counts = [json.loads(f.read_text()) for f in (folder / arm).glob("*.json")]
            out, log = folder / f"{arm}.json", (folder / f"{arm}.log").read_text(errors="replace")
            assert process.returncode == 0, f"{arm}: {log[-3000:]}"
            found[arm] = {"engines": json.loads(out.read_text()), "log": log, "counts": counts}
    finally:
        for process in started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return found


def _start(arm: str, folder: Path, path: str) -> subprocess.Popen[bytes]:
    mode, engines, fuse = ARMS[arm]
    (folder / arm).mkdir()
    environment = os.environ | ENVIRONMENT | {
        "PYTHONPATH": path, "FUSEWISE_VLLM": mode, "FUSEWISE_HOME": str(folder / "home"),
        "VLLM_CACHE_ROOT": str(folder / f"cache-{arm}"), "ONE_GPU_COUNTS": str(folder / arm),
        "TRITON_CACHE_DIR": str(folder / f"triton-{arm}"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{arm}"),
        **({"ONE_GPU_BREAKS": "1"} if arm == "broken" else {}),
    }  # fmt: skip
    command = [sys.executable, str(HERE / "run.py"), str(folder / "model")]
    with (folder / f"{arm}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, str(folder / f"{arm}.json"), engines, fuse],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _logprobs(engine: dict[str, Any]) -> list[float]:
    return [value for answer in engine["answers"] for value in answer["prompt_logprobs"]]


def test_the_logits_differ_from_token_to_token(arms: dict[str, Any]) -> None:
    spread = _logprobs(arms["nofuse"]["engines"][0])
    assert len(spread) > 900
    assert statistics.stdev(spread) > 4 * NOISE


def _is_noise(engine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the prompts' log-probabilities differ by nothing more than roundings."""
    off = [abs(a - b) for a, b in zip(_logprobs(engine), _logprobs(other), strict=True)]
    return statistics.mean(off) < NOISE / 5 and max(off) < NOISE


@pytest.mark.parametrize("arm", FUSED)
def test_log_probabilities_are_those_without_fusion(arms: dict[str, Any], arm: str) -> None:
    for engine in arms[arm]["engines"]:
        assert _is_noise(engine, arms["nofuse"]["engines"][0])


@pytest.mark.parametrize("arm", FUSED)
def test_greedy_tokens_are_those_without_fusion_but_for_ties(
    arms: dict[str, Any], arm: str
) -> None:
    for engine in arms[arm]["engines"]:
        pairs = zip(engine["answers"], arms["nofuse"]["engines"][0]["answers"], strict=True)
        equal = 0
        for mine, plain in pairs:
            for step, (a, b) in enumerate(zip(mine["tokens"], plain["tokens"], strict=True)):
                if a != b:  # what follows another token is another text
                    assert plain["gaps"][step] < NOISE, f"{arm}: no tie at {step}"
                    break
                assert abs(mine["logprobs"][step] - plain["logprobs"][step]) < NOISE
                equal += 1
        assert equal >= 15


def test_full_mode_took_hold_and_native_kernels_ran(arms: dict[str, Any]) -> None:
    log, counts = arms["full"]["log"], arms["full"]["counts"]
    assert "fusewise: full mode on" in log
    assert "native.one_shot" in log
    assert len(counts) == 4  # two engines of two workers
    assert all(count["all_reduce_rms_norm_into"] >= 8 for count in counts)
    assert len({json.dumps(count) for count in counts}) <= 2
    for arm in ("nofuse", "default", "cap", "broken"):
        assert arms[arm]["counts"] == []


def test_one_rank_that_cannot_keeps_full_mode_from_all(arms: dict[str, Any]) -> None:
    log = arms["broken"]["log"]
    assert "rank 1: RuntimeError: broken on purpose" in log
    assert "fusewise: full mode on" not in log


def test_the_cap_was_lowered_and_the_longest_prompt_lies_beyond(arms: dict[str, Any]) -> None:
    assert "fusewise: fusion cap 64M -> 256K (cap)" in arms["cap"]["log"]
    for arm in ("full", "broken"):
        assert "fusewise: fusion cap 64M -> 256K (full, 1.041M once its" in arms[arm]["log"]
    assert "fusion cap" not in arms["default"]["log"]


def test_two_engines_one_after_the_other_answer_alike(arms: dict[str, Any]) -> None:
    # They were not equal to the bit when tried. Prompts that share a step in one engine and not in
    # the other would explain it; nobody has shown that it is so.
    assert _is_noise(*arms["full"]["engines"])
