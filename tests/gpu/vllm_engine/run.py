"""One arm: vLLM at TP2 on one GPU, greedy tokens and the prompts' log-probabilities as JSON.

    python run.py MODEL OUT ENGINES [FUSE]

ENGINES are started one after the other in this process; FUSE is ``fuse`` or ``nofuse``.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = (3, 17, 64, 200, 700)  # tokens; 700 of hidden 2048 in bf16 are 2.7 MiB
NEW_TOKENS = 6


def answers(model: str, passes: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model, load_format="dummy", skip_tokenizer_init=True, tensor_parallel_size=2,
        dtype="bfloat16", seed=7, max_model_len=1024, max_num_batched_tokens=2048, max_num_seqs=16,
        gpu_memory_utilization=0.05, kv_cache_memory_bytes=2**28, attention_backend="FLASH_ATTN",
        disable_custom_all_reduce=True, enable_prefix_caching=False, disable_log_stats=True,
        kernel_config={"enable_flashinfer_autotune": False},
        compilation_config={
            "pass_config": passes, "cudagraph_capture_sizes": [1, 8],
            "cudagraph_mode": "FULL_AND_PIECEWISE",
        },
    )  # fmt: skip
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(10, 30000) for _ in range(length)]}
        for length in PROMPTS
    ]
    asked = SamplingParams(
        max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, temperature=0.0, logprobs=2,
        prompt_logprobs=0,
    )  # fmt: skip
    found = []
    for prompt, out in zip(prompts, engine.generate(prompts, asked, use_tqdm=False), strict=True):
        first, ids = out.outputs[0], prompt["prompt_token_ids"]
        prompt_logprobs = [
            at[token].logprob for token, at in zip(ids, out.prompt_logprobs, strict=True) if at
        ]
        ranked = [sorted((o.logprob for o in at.values()), reverse=True) for at in first.logprobs]
        found.append(
            {
                "tokens": list(first.token_ids),
                "logprobs": [
                    at[t].logprob for t, at in zip(first.token_ids, first.logprobs, strict=True)
                ],
                "gaps": [best - second for best, second, *_ in ranked],
                "prompt_logprobs": prompt_logprobs,
            }
        )
    del engine
    gc.collect()
    return found


def main() -> None:
    model, out, engines, fuse = sys.argv[1:5]
    passes = {} if fuse == "fuse" else {"fuse_allreduce_rms": False}
    told = []
    for _ in range(int(engines)):
        began_s = time.monotonic()
        found = answers(model, passes)
        told.append({"answers": found, "seconds": round(time.monotonic() - began_s, 1)})
        Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
