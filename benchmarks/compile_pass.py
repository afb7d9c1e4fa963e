"""What the fusion pass costs at compile time: alone, and as a part of torch.compile.

    python benchmarks/compile_pass.py --out benchmarks/results/compile_pass.json

Alone: a Llama-shaped decoder (attention with rotary embedding, gated MLP) of 8 to 64 layers, traced
on fake tensors as Inductor's post-grad passes would see it. As a part: the same decoder of 16
layers, compiled by torch.compile with and without the pass, in turns, graphs never from a cache;
CPU time, so that other load counts little, without that of the C++ compiler, which is the greater
part and would only bring the ratio nearer to one. One rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
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

HIDDEN, HEADS, TOKENS = 256, 4, 16  # small: what is compiled also runs, on a CPU
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


def decoder(layers: int) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of ``layers`` layers and its inputs: weights too; two all-reduces per layer."""

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
    shapes = (TOKENS, HIDDEN), (TOKENS, WIDTH), (TOKENS, WIDTH), (HIDDEN, HIDDEN), (HIDDEN,)
    return forward, tuple(torch.zeros(shape, dtype=bf16) for shape in shapes)


def compiled_s(layers: int, fusion: FusionPass | None) -> float:
    """This process's CPU seconds of one compilation: of a model's first call."""
    from fusewise.graph.inductor import InductorBackend

    torch._dynamo.reset()
    forward, inputs = decoder(layers)
    backend = "inductor" if fusion is None else InductorBackend(fusion)
    compiled = torch.compile(forward, backend=backend)
    uncached = torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1)
    with torch.no_grad(), uncached:
        times = []
        for _ in range(2):  # the second call only runs
            start = time.process_time()
            compiled(*inputs)
            times.append(time.process_time() - start)
    return times[0] - times[1]


def ratio(layers: int, rounds: int, folder: str) -> dict[str, Any]:
    """With and without the pass in turns; each round gives one ratio."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = str(dist.group.WORLD.group_name)
    dist.distributed_c10d._register_process_group("tp", dist.group.WORLD)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    with fusewise.Communicator() as communicator:
        fusions = [
            FusionPass(communicator.handle, {"bfloat16": plan()}, group_names=["tp", group])
            for _ in range(rounds + 1)
        ]
        for fusion in (fusions[0], None):  # kernels are compiled once, into an empty cache
            compiled_s(layers, fusion)
        pairs = []
        for number, fusion in enumerate(fusions[1:]):
            arms = (fusion, None) if number % 2 else (None, fusion)
            taken = {arm is not None: compiled_s(layers, arm) for arm in arms}
            pairs.append((taken[True], taken[False]))
            print(pairs[-1], file=sys.stderr)
    dist.destroy_process_group()
    ratios = sorted(on / off for on, off in pairs)
    return {
        "layers": layers,
        "rewritten": sum(site.rewritten for site in fusions[1].sites),
        "with_cpu_s": [round(on, 3) for on, _ in pairs],
        "without_cpu_s": [round(off, 3) for _, off in pairs],
        "ratio": round(statistics.median(ratios), 4),
        "ratio_range": [round(ratios[0], 4), round(ratios[-1], 4)],
    }


def plan() -> Plan:
    bands = (Band(0, None, "native.one_shot", "fuse", "measured"),)
    table = Table("all_reduce_rms_norm", HIDDEN, bands, 0, 2**30)
    return Plan("bfloat16", "nccl + rms_norm", (table,), "fuses everywhere")


def measure(layers: int, rounds: int) -> dict[str, Any]:
    times_ms = []
    for _ in range(rounds):
        forward, inputs = decoder(layers)
        graph = make_fx(forward, select_decomp_table(), tracing_mode="fake")(*inputs).graph
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
    parser.add_argument("--compiled-layers", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compiled = ratio(arguments.compiled_layers, arguments.rounds, folder)
    measure(min(arguments.layers), 1)  # first call: operators are looked up once per process
    rows = [measure(layers, arguments.rounds) for layers in arguments.layers]
    document = {
        "what": "the fusion pass alone (time_ms, median of rounds), and the CPU time of"
        " torch.compile with it over that without (ratio, median of rounds)",
        "command": " ".join(["python", *sys.argv]),
        "rounds": arguments.rounds,
        "fusewise": fusewise.__version__,
        "fingerprint": probe(1, device_type="cpu").model_dump(mode="json", exclude_none=True),
        "rows": rows,
        "compiled": compiled,
    }
    text = json.dumps(document, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
