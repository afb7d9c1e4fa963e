"""Real offline vLLM with and without fusewise, engines resident side by side and asked in turn.

    python benchmarks/vllm_ab.py --output benchmarks/results/vllm_ab.json

Arms: ``off`` (no fusion), ``default`` (vLLM as it is), ``cap`` and ``full`` (this package's two
modes). Weights are dummies, so no model is downloaded. Interleaving the arms lets a host's jitter
hit all alike; GPU time comes from vLLM's own torch profiler on every rank, in rounds of their own,
because profiling slows the host. Written for vLLM 0.22.1.

``--memory`` is one engine's share of each GPU: four arms of the 30B shape need ``--layers`` or
fewer ``--arms`` to fit. The modes need ``fusewise tune`` to have run on the node.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_trace import (
    difference,
    first_divergence,
    newest_by_rank,
    quartiles,
    read_kernels,
    summary,
)

ARMS = ("off", "default", "cap", "full")
PROMPT_TOKENS = 1024
DECODE_PROMPT_TOKENS = 128
DECODE_STEPS = 32
_MODE = {"off": "off", "default": "off", "cap": "cap", "full": "full"}

# Qwen/Qwen3-30B-A3B as published.
_QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "hidden_act": "silu",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
# The sizes of meta-llama/Llama-3.1-70B.
_DENSE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "hidden_act": "silu",
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES = {"qwen3-30b-a3b": _QWEN, "dense-8192": _DENSE}


class Engine:
    """One resident vLLM, and what it was asked."""

    def __init__(self, arm: str, asked: argparse.Namespace, model: Path, traces: Path) -> None:
        from vllm import LLM

        # Read by our plugin in this process while the config is built, and by the workers, which
        # inherit the environment of this moment.
        os.environ["FUSEWISE_VLLM"] = _MODE[arm]
        self.arm, self.traces = arm, traces / arm
        self.traces.mkdir()
        passes = {"fuse_allreduce_rms": False} if arm == "off" else {}
        self.llm = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            tensor_parallel_size=asked.tp,
            gpu_memory_utilization=asked.memory,
            max_model_len=2 * PROMPT_TOKENS,
            max_num_batched_tokens=max(asked.prefill),
            max_num_seqs=max(asked.decode),
            enable_prefix_caching=False,
            seed=0,
            attention_config={"backend": "FLASH_ATTN"},
            moe_backend="triton",
            compilation_config={"pass_config": passes},
            profiler_config={
                "profiler": "torch",
                "torch_profiler_dir": str(self.traces),
                "torch_profiler_with_stack": False,
                "torch_profiler_dump_cuda_time_total": False,
            },
        )
        config = self.llm.llm_engine.vllm_config.compilation_config
        self.facts = {
            "field_mb": config.pass_config.fi_allreduce_fusion_max_size_mb,
            "cap_bytes": config.pass_config.flashinfer_max_size(asked.tp),
            "fuse_allreduce_rms": bool(config.pass_config.fuse_allreduce_rms),
            "endpoints": config.compile_ranges_endpoints,
        }

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Wall-clock seconds, and the output tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True,
                                  detokenize=False)  # fmt: skip
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(asked, sampling, use_tqdm=False)
        elapsed = time.perf_counter() - start
        return elapsed, [list(output.outputs[0].token_ids) for output in outputs]

    def profile(self, prompts: list[list[int]], tokens: int, ranks: int) -> dict[int, Any]:
        """Kernels of one ``generate`` by rank."""
        began = time.time_ns()
        self.llm.start_profile()
        self.generate(prompts, tokens)
        self.llm.stop_profile()
        traces = newest_by_rank(self.traces, began)
        if sorted(traces) != list(range(ranks)):
            raise RuntimeError(f"{self.arm}: traces of ranks {sorted(traces)}, expected {ranks}")
        return {rank: read_kernels(trace) for rank, trace in traces.items()}


def prompts_of(count: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Random prompts, the same for every arm."""
    source = random.Random(count * 100_000 + tokens)
    return [[source.randrange(1000, vocabulary) for _ in range(tokens)] for _ in range(count)]


def in_turn(engines: list[Engine], rounds: int, source: random.Random) -> Any:
    """Engines in a new order every round."""
    for _ in range(rounds):
        yield from source.sample(engines, len(engines))


def measure(engines: list[Engine], asked: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Every workload: wall-clock over many rounds, then GPU time over a few."""
    source = random.Random(0)
    wall: dict[str, list[float]] = {}
    gpu: dict[str, list[dict[str, Any]]] = {}
    for name, prompts, tokens in workloads(asked, vocabulary):
        for engine in engines:
            for _ in range(2):  # first use compiles and fills allocators
                engine.generate(prompts, tokens)
        for engine in in_turn(engines, asked.rounds, source):
            elapsed, _ = engine.generate(prompts, tokens)
            wall.setdefault(f"{engine.arm}/{name}", []).append(1e3 * elapsed)
        for engine in in_turn(engines, asked.profiles, source):
            seen = gpu_times(engine, prompts, tokens, asked.tp)
            gpu.setdefault(f"{engine.arm}/{name}", []).append(seen)
    return {
        "wall_ms": {key: quartiles(values) for key, values in wall.items()},
        "gpu": {key: _median_profile(values) for key, values in gpu.items()},
    }


def workloads(asked: argparse.Namespace, vocabulary: int) -> Any:
    """(name, prompts, output tokens) of each workload."""
    for tokens in asked.prefill:
        prompts = prompts_of(tokens // PROMPT_TOKENS, PROMPT_TOKENS, vocabulary)
        yield f"prefill {tokens}", prompts, 1
    for batch in asked.decode:
        prompts = prompts_of(batch, DECODE_PROMPT_TOKENS, vocabulary)
        yield f"decode {batch}", prompts, 1 + DECODE_STEPS


def gpu_times(engine: Engine, prompts: Any, tokens: int, ranks: int) -> dict[str, Any]:
    """GPU time of one step by rank; for decode, of the steps after the first token."""
    whole = engine.profile(prompts, tokens, ranks)
    if tokens == 1:
        return {str(rank): summary(kernels) for rank, kernels in whole.items()}
    first = engine.profile(prompts, 1, ranks)
    return {str(rank): summary(difference(whole[rank], first[rank]), tokens - 1) for rank in whole}


def _median_profile(profiles: list[dict[str, Any]]) -> dict[str, Any]:
    """The profile whose slowest rank's total is the median, and all totals beside it."""
    ordered = sorted(profiles, key=lambda ranks: max(r["total_us"] for r in ranks.values()))
    totals = [{rank: r["total_us"] for rank, r in profile.items()} for profile in profiles]
    return {"ranks": ordered[(len(ordered) - 1) // 2], "all_totals_us": totals}


def divergence(engines: list[Engine], vocabulary: int) -> dict[str, Any]:
    """Greedy outputs of each arm against the first: the first token that differs, per prompt."""
    prompts = prompts_of(16, DECODE_PROMPT_TOKENS, vocabulary)
    outputs = {engine.arm: engine.generate(prompts, DECODE_STEPS)[1] for engine in engines}
    reference = "default" if "default" in outputs else engines[0].arm
    return {
        "against": reference,
        "first_differing_token": {
            arm: first_divergence(outputs[reference], tokens) for arm, tokens in outputs.items()
        },
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's, to fit")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--memory", type=float, default=0.24, help="of each GPU, per engine")
    parser.add_argument("--rounds", type=int, default=30, help="of wall-clock")
    parser.add_argument("--profiles", type=int, default=3, help="rounds of GPU time")
    parser.add_argument("--prefill", nargs="*", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--decode", nargs="*", type=int, default=[64, 128])
    asked = parser.parse_args()
    if not asked.prefill or not asked.decode or any(t % PROMPT_TOKENS for t in asked.prefill):
        parser.error(f"--prefill takes multiples of {PROMPT_TOKENS}, and both need one value")
    names = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "fusewise" not in names:
        parser.error("vLLM would not find the plugin: install fusewise with pip first")
    return asked


def main() -> int:
    asked = parse()
    shape: dict[str, Any] = {**SHAPES[asked.shape]}
    shape["num_hidden_layers"] = asked.layers or shape["num_hidden_layers"]
    from vllm.plugins import load_general_plugins

    from fusewise.node import probe

    # Loaded once per process: with a mode that prepares it. Each engine then has its own.
    os.environ["FUSEWISE_VLLM"] = "cap"
    load_general_plugins()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        engines = [Engine(arm, asked, model, Path(scratch)) for arm in asked.arms]
        results = measure(engines, asked, shape["vocab_size"])
        results["greedy"] = divergence(engines, shape["vocab_size"])
    record = {
        "what": "vLLM with and without fusewise; engines resident side by side, asked in turn",
        "shape": asked.shape,
        "num_hidden_layers": shape["num_hidden_layers"],
        "vllm": importlib.metadata.version("vllm"),
        "fusewise": importlib.metadata.version("fusewise"),
        "node": probe(asked.tp).model_dump(mode="json"),
        "arms": {engine.arm: engine.facts for engine in engines},
        **results,
    }
    asked.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return 0


def table(record: dict[str, Any]) -> str:
    """GPU time per step of each arm and workload, slowest rank, as Markdown."""
    lines = ["| workload | arm | GPU ms | all-reduce + norm ms | wall ms p25 / median / p75 |"]
    lines.append("|---|---|---|---|---|")
    for key, entry in record["gpu"].items():
        arm, name = key.split("/")
        slowest = max(entry["ranks"].values(), key=lambda rank: rank["total_us"])
        wall = record["wall_ms"][key]
        lines.append(
            f"| {name} | {arm} | {slowest['total_us'] / 1e3:.2f} | "
            f"{slowest['all_reduce_norm_us'] / 1e3:.2f} | "
            f"{wall['p25']:.1f} / {wall['median']:.1f} / {wall['p75']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
