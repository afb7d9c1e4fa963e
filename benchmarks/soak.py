"""A million replays of the shipped kernels in random order of shapes, ranks drifting, all checked.

    python benchmarks/soak.py --out benchmarks/results/one_gpu/soak.json

2, 4 and 8 virtual ranks on one GPU (``tests/gpu/test_virtual_ranks.py``), every block waiting a
random while before it sends and before it takes. One CUDA graph per shape and kind of output; each
replay poisons its results, and every fourth compares all of them on the device. Correctness only.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from fusewise.node import probe
from fusewise.shape import Shape
from tests.gpu.test_virtual_ranks import CASES, Ranks

SHAPES = (
    (1, 2048), (2, 8192), (3, 7168), (5, 2880), (7, 5120), (16, 2048), (17, 2880), (23, 4096),
    (29, 264), (31, 2048),
)  # fmt: skip
CHECKED_SHARE = 4
SYNCHRONISED = 5000  # replays between two looks at the counter


def graphs_of(call: Any, wrong: torch.Tensor) -> tuple[Any, Any, list[torch.Tensor]]:
    """The call alone, and poisoned before and compared behind with its first, checked results,
    which the graph reads and the caller keeps."""
    call.poison()
    call.run()
    call.check()
    results = [call.out, call.total] if call.output == "kNorm" else [call.out]
    expected = [result.view(torch.int16).clone() for result in results]
    bare, checked = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(bare):
        call.run()
    with torch.cuda.graph(checked):
        for result in results:
            result.fill_(float("nan"))
        call.run()
        for result, want in zip(results, expected, strict=True):
            wrong += (result.view(torch.int16) != want).sum()
    return bare, checked, expected


def soak(strategy: str, world_size: int, replays: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    ranks = Ranks(strategy, world_size)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    calls = [
        ranks.call(Shape(tokens, hidden, dtype), output)
        for tokens, hidden in SHAPES
        for dtype, output in (("bfloat16", "kNorm"), (rng.choice(["float16", "float32"]), "kSum"))
    ]
    graphs = [graphs_of(call, wrong) for call in calls]
    checked, began_s = 0, time.monotonic()
    for done in range(1, replays + 1):
        bare, compared, _ = graphs[rng.randrange(len(graphs))]
        if rng.randrange(CHECKED_SHARE) == 0:
            compared.replay()
            checked += 1
        else:
            bare.replay()
        if done % SYNCHRONISED == 0 and int(wrong):
            break
    torch.cuda.synchronize()
    return {
        "strategy": strategy, "world_size": world_size, "replays": done, "checked": checked,
        "shapes": len(calls), "seed": seed, "wrong_elements": int(wrong),
        "slots_empty_and_nobody_gave_up": ranks.is_idle(),
        "took_s": round(time.monotonic() - began_s, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replays", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="soak.json")
    arguments = parser.parse_args()
    rows = []
    for strategy, world_size in CASES:
        rows.append(soak(strategy, world_size, arguments.replays, arguments.seed))
        print(rows[-1], flush=True)
        record = {
            "command": f"python benchmarks/soak.py --replays {arguments.replays}",
            "fingerprint": probe(1, device_type="cuda").model_dump(exclude_none=True),
            "rows": rows,
        }
        Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
