"""Our kernels against every peer on this node, paired and interleaved in one run.

    torchrun --nproc-per-node 2 benchmarks/native_kernels.py --out native_kernels.json

Fused calls, plain all-reduces, FP8 outputs, the links' own store bandwidth and the Python of an
eager call. Prints the targets last. Needs GPUs; FlashInfer where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from native_summary import summary

import fusewise
from fusewise.backends.native.fp8 import Fp8
from fusewise.backends.native.strategies import OneShot
from fusewise.backends.native.workspace import symmetric_bytes
from fusewise.backends.registry import ids_for
from fusewise.backends.steps import build_backend, rendezvous
from fusewise.backends.torch_dist import Nccl
from fusewise.node import Fingerprint
from fusewise.operation import Op
from fusewise.profiles.intervals import median_interval
from fusewise.profiles.schema import Profile, Provenance, Sample
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.run.communicator import Communicator
from fusewise.shape import Shape, size_grid
from fusewise.tune.operands import usual
from fusewise.tune.timing import Arena, Buffers, Runner, captured, interleave
from fusewise.tune.verify import EPS, check

OPS: tuple[Op, ...] = ("all_reduce_rms_norm", "all_reduce")
BANDWIDTH_BYTES = 256 * 2**20
EAGER_CALLS = 2000
STORES = """
extern "C" __global__ void store(uint4* to, long long count) {
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
    to[i] = make_uint4(1, 2, 3, 4);
}
"""


class Fp8Runner(Runner):
    """The fused call with FP8 beside the normal output."""

    def __init__(self, backend: OneShot, buffers: Buffers, fp8: Fp8) -> None:
        self.path = f"{backend.id}+fp8_{fp8.scaling}"
        self.calls, self._cuda = buffers.calls, True
        scale = torch.ones(1, device=backend.group.device) if fp8.scaling == "static" else None

        def call(i: int) -> Any:
            at = i % buffers.count
            return backend.all_reduce_rms_norm_fp8(
                buffers.x[at], buffers.residual[at], buffers.weight, EPS, fp8, static_scale=scale
            )

        self._run = captured(backend, call, self.calls)


def main() -> None:
    arguments = parse()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = Group(timeout_s=300.0)
    node = fingerprint_of(group)
    widest = max(arguments.hidden_sizes)
    max_shape = Shape(-(-arguments.max_bytes // (2 * widest)), widest)
    backends, excluded = [], {}
    for backend_id in ids_for("cuda"):
        backend, reason = build_backend(backend_id, group, node, max_shape)
        if backend is None:
            excluded[backend_id] = reason
        else:
            backends.append(backend)
    arena, rows = Arena(group, max_shape), []
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "fingerprint": node.model_dump(mode="json"),
        "bandwidth_gbps": store_bandwidth(group),
        "python_us": 0.0,
        "excluded": excluded,
        "rows": rows,
    }
    for hidden_size in arguments.hidden_sizes:
        for shape in size_grid(arguments.min_bytes, arguments.max_bytes, hidden_size, "bfloat16"):
            for op in OPS:
                rows += measure(group, backends, op, shape, arena, arguments.rounds)
            if rank == 0:
                print(shape, {r["path"]: r["time_us"] for r in rows if r["shape"] == str(shape)})
        write(record, arguments.out, rank)  # a run cut short keeps the hidden sizes it finished
    record["python_us"] = eager_us(group, node, Buffers(arena, Shape(1, 2048)))
    write(record, arguments.out, rank)
    if rank == 0:
        print("\n".join(summary(rows, record["bandwidth_gbps"], record["python_us"])))
    for backend in backends:
        backend.close()  # a pool that NCCL allocated from must go before NCCL does
    group.barrier("end")
    dist.destroy_process_group()


def write(record: dict[str, Any], file: str, rank: int) -> None:
    if rank == 0:
        Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(
    group: Group, backends: list[Any], op: Op, shape: Shape, arena: Arena, rounds: int
) -> list[dict[str, Any]]:
    """Verifies and times every path at one shape; one that computes wrongly is left out."""
    buffers, runners = Buffers(arena, shape), []
    for backend in backends:
        if backend.admits(shape) is not None or (op == "all_reduce" and not backend.plain):
            continue
        if max(group.gather("wrong", check(backend, group, usual(op, shape, 1)).wrong)):
            print(f"{backend.id} is wrong at {shape}")
            continue
        runners.append(Runner(backend, op, buffers))
        if op == "all_reduce_rms_norm" and backend.id in ("native.one_shot", "native.two_shot"):
            runners += [
                Fp8Runner(backend, buffers, Fp8(kind, keep_norm=False))
                for kind in ("static", "token", "group")
            ]
    return [
        {
            "op": op, "path": path,
            "shape": str(shape), "num_tokens": shape.num_tokens, "hidden_size": shape.hidden_size,
            "message_bytes": shape.message_bytes, "time_us": median_interval(times_us).median,
            "times_us": times_us,
        }
        for path, times_us in interleave(group, runners, rounds).items()
    ]  # fmt: skip


def store_bandwidth(group: Group) -> float:
    """GB/s per direction of plain 16-byte stores to the next rank, all ranks at once."""
    from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

    device = Device(group.device.index)
    device.set_current()
    buffer = symmetric_bytes(BANDWIDTH_BYTES, group.device)
    target = rendezvous(buffer, group).buffer_ptrs[(group.rank + 1) % group.world_size]
    program = Program(STORES, "c++", ProgramOptions(arch=f"sm_{device.arch}"))
    kernel = program.compile("cubin").get_kernel("store")
    config = LaunchConfig(grid=8 * 132, block=256)
    stream = torch.cuda.current_stream()
    best_ms = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        group.barrier("stores")
        begin.record()
        launch(stream, config, kernel, target, BANDWIDTH_BYTES // 16)
        end.record()
        end.synchronize()
        best_ms = min(best_ms, begin.elapsed_time(end))
    slowest_ms = max(group.gather("bandwidth", best_ms))
    return BANDWIDTH_BYTES / slowest_ms / 1e6


def eager_us(group: Group, node: Fingerprint, buffers: Buffers) -> float:
    """Python of one ``Communicator.all_reduce_rms_norm`` at one token; the device keeps up."""
    x, residual, weight = buffers.x[0], buffers.residual[0], buffers.weight
    with Communicator(group, always_native(node)) as communicator:
        begin = 0.0
        for i in range(-200, EAGER_CALLS):
            if i == 0:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            communicator.all_reduce_rms_norm(x, residual, weight, EPS)
        elapsed_us = (time.perf_counter() - begin) * 1e6
        torch.cuda.synchronize()
    return elapsed_us / EAGER_CALLS


def always_native(node: Fingerprint) -> Profile:
    """Made-up times by which a plan runs everything on our one-shot kernel."""
    paths = OneShot.record(), Nccl.record()
    samples = [
        Sample(path=path.name, num_tokens=tokens, hidden_size=2048, times_us=(time_us,) * 5)
        for tokens in (1, 1024)
        for path, time_us in zip(paths, (1.0, 9.0), strict=True)
    ]
    provenance = Provenance(
        origin="measured", source="made up", created="2026-01-01", fusewise=fusewise.__version__
    )
    return Profile(
        provenance=provenance, fingerprint=node, dtype="bfloat16", baseline=paths[1].name,
        paths=paths, samples=tuple(samples),
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="native_kernels.json")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[2048, 4096, 7168])
    parser.add_argument("--min-bytes", type=int, default=4096)
    parser.add_argument("--max-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--rounds", type=int, default=21)
    return parser.parse_args()


if __name__ == "__main__":
    main()
