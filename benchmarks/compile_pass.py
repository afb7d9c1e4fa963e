"""How long the fusion pass takes on graphs of 8 to 64 layers, and whether it grows linearly.

    python benchmarks/compile_pass.py --out benchmarks/results/compile_pass.json

Traces a Llama-shaped decoder (attention with rotary embedding, gated MLP) on fake tensors, as
Inductor's post-grad passes would see it, and times the pass alone. No ranks, no kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import fusewise
from fusewise.graph.fusion_pass import FusionPass
from fusewise.node import probe
from fusewise.profiles.bands import Band, Plan, Table

HIDDEN, HEADS, TOKENS = 2048, 16, 64
WIDTH = HIDDEN // HEADS


def all_reduce(x: Tensor) -> Tensor:
    ops = torch.ops._c10d_functional
    waited: Tensor = ops.wait_tensor(ops.all_reduce(x, "sum", "tp"))
    return waited


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def decoder(layers: int) -> Any:
    """The graph of ``layers`` layers: weights are inputs, two all-reduces per layer."""

    def forward(x: Tensor, cos: Tensor, sin: Tensor, square: Tensor, row: Tensor) -> Tensor:
        residual, x = x, rms_norm(x, row)
        for _ in range(layers):
            q, k, v = ((x @ square).view(1, TOKENS, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            seen = (q @ k.transpose(-1, -2) * WIDTH**-0.5).softmax(-1) @ v
            seen = seen.transpose(1, 2).reshape(TOKENS, HIDDEN)
            residual = residual + all_reduce(seen @ square)
            x = rms_norm(residual, row)
            gated = torch.nn.functional.silu(x @ square) * (x @ square)
            residual = residual + all_reduce(gated @ square)
            x = rms_norm(residual, row)
        return x

    bf16 = torch.bfloat16
    inputs = (
        torch.empty(TOKENS, HIDDEN, dtype=bf16),
        torch.empty(TOKENS, WIDTH, dtype=bf16),
        torch.empty(TOKENS, WIDTH, dtype=bf16),
        torch.empty(HIDDEN, HIDDEN, dtype=bf16),
        torch.empty(HIDDEN, dtype=bf16),
    )
    return make_fx(forward, select_decomp_table(), tracing_mode="fake")(*inputs)


def plan() -> Plan:
    bands = (Band(0, None, "native.one_shot", "fuse", "measured"),)
    table = Table("all_reduce_rms_norm", HIDDEN, bands, 0, 2**30)
    return Plan("bfloat16", "nccl + rms_norm", (table,), "fuses everywhere")


def measure(layers: int, rounds: int) -> dict[str, Any]:
    times_ms = []
    for _ in range(rounds):
        graph = decoder(layers).graph
        nodes = len(graph.nodes)
        fusion = FusionPass("tp", {"bfloat16": plan()})
        start = time.perf_counter()
        fusion(graph)
        times_ms.append((time.perf_counter() - start) * 1e3)
        graph.lint()
    return {
        "layers": layers,
        "nodes": nodes,
        "sites": len(fusion.sites),
        "rewritten": sum(site.rewritten for site in fusion.sites),
        "time_ms": round(statistics.median(times_ms), 3),
        "time_ms_max": round(max(times_ms), 3),
        "time_us_per_layer": round(statistics.median(times_ms) / layers * 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measure(min(arguments.layers), 1)  # first call: operators are looked up once per process
    rows = [measure(layers, arguments.rounds) for layers in arguments.layers]
    document = {
        "what": "time of the fusion pass alone, median of rounds, on the CPU that compiles",
        "command": " ".join(["python", *sys.argv]),
        "rounds": arguments.rounds,
        "fusewise": fusewise.__version__,
        "fingerprint": probe(1, device_type="cpu").model_dump(mode="json", exclude_none=True),
        "rows": rows,
    }
    text = json.dumps(document, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
