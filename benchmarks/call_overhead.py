"""Python's share of a call: host time of an eager call, its operator, and torch.add beside them.

    python benchmarks/call_overhead.py --out benchmarks/results/one_gpu/call_overhead.json
    python benchmarks/call_overhead.py --stub --against OTHER/src     # no GPU; two source trees

Two ranks (a GPU each, or sharing one) and our one-shot kernel at every size. A burst of calls is
timed on the host and waited for outside of the clock; arms take turns. With ``--stub`` one process
plays rank 0, the driver's launch is a C function that returns at once, and tensors lie on the CPU:
no time of a GPU host, but two source trees compare, in processes that take turns.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests/: its doubles, and how it starts ranks

NUM_TOKENS, HIDDEN_SIZE, EPS = 8, 4096, 1e-6
BURST = 20  # calls; far fewer than a stream's queue holds, so that none waits for the device
KEY = "CompositeExplicitAutograd"
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def arms_of(communicator: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, on tensors of its own."""
    device = communicator.group.device
    x, residual = (
        torch.zeros(NUM_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    weight = torch.nn.Parameter(x[0].clone())
    operator, handle = torch.ops.fusewise.all_reduce_rms_norm.default, communicator.handle
    empty = empty_operator(str(operator._schema), (torch.zeros_like(x), torch.zeros_like(x)))
    return {
        "communicator": lambda: communicator.all_reduce_rms_norm(x, residual, weight, EPS),
        "operator": lambda: operator(x, residual, weight, EPS, 0.0, handle),
        "empty operator": lambda: empty(x, residual, weight, EPS, 0.0, handle),
        "all_reduce": lambda: communicator.all_reduce(x),
        "two empty_like": lambda: (torch.empty_like(x), torch.empty_like(x)),
        "torch.add": lambda: torch.add(x, residual),
    }


@functools.lru_cache(maxsize=1)
def _library() -> tuple[Any, dict[str, Any]]:
    library, results = torch.library.Library("fusewise_floor", "DEF"), {}
    return library, results


def empty_operator(schema: str, results: Any) -> Any:
    """An operator of our schema whose kernel returns at once: torch's own share of a call."""
    library, kept = _library()
    if not kept:
        library.define(schema.partition("::")[2])
        library.impl("all_reduce_rms_norm", lambda *given: kept["results"], KEY)
    kept["results"] = results
    return torch.ops.fusewise_floor.all_reduce_rms_norm.default


def one_round(communicator: Any, turn: int) -> dict[str, float]:
    """Host µs of one call, by mode and arm."""
    found: dict[str, float] = {}
    for mode, entered in MODES.items():
        with entered():
            arms = arms_of(communicator)
            names = list(arms)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                call = arms[name]
                call()
                _wait(communicator)
                begin = time.perf_counter_ns()
                for _ in range(BURST):
                    call()
                took = time.perf_counter_ns() - begin
                _wait(communicator)
                found[f"{mode}: {name}"] = took / BURST / 1000
    return found


def _wait(communicator: Any) -> None:
    if communicator.group.device.type == "cuda":
        torch.cuda.synchronize()


def always_native() -> Any:
    """A plan that runs everything on our one-shot kernel."""
    from fusewise.profiles.bands import Band, Plan, Table

    path = "native.one_shot"
    bands = (Band(0, None, path, "fuse", "measured"),)
    ops = "all_reduce_rms_norm", "all_reduce"
    tables = tuple(Table(op, HIDDEN_SIZE, bands, 0, 0) for op in ops)
    return Plan("bfloat16", path, tables, "made up")


def on_gpu(rank: int, rounds: int) -> list[dict[str, float]]:
    """One rank of the measurement."""
    from fusewise.run.operators import Communicator

    with Communicator(profile=always_native(), max_message_bytes=2**20) as communicator:
        return [one_round(communicator, turn) for turn in range(rounds + 1)][1:]


def stubbed() -> Any:
    """Rank 0 of a group whose peer and driver are made up."""
    from cuda.bindings import driver

    from fusewise.backends.native import workspace
    from fusewise.backends.native.cuda import launch
    from fusewise.backends.native.strategies import OneShot
    from fusewise.run.operators import Communicator
    from tests.groups import MirrorGroup

    facts = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    rendezvous = types.SimpleNamespace(buffer_ptrs=[4096, 8192])
    nothing = ctypes.CDLL("libm.so.6").fegetround  # returns 0 and looks at no argument
    nothing.argtypes = (ctypes.c_void_p,) * 4
    success = (driver.CUresult.CUDA_SUCCESS,)
    for place, name, made in (
        (torch.cuda, "get_device_properties", lambda device: facts),
        (torch._C, "_cuda_getDevice", lambda: None),
        (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
        (torch._C, "_cuda_isCurrentStreamCapturing", lambda: False),
        (workspace, "symmetric_bytes", lambda n, device: torch.empty(n, dtype=torch.uint8)),
        (workspace, "_rendezvous", lambda buffer, group: rendezvous),
        (workspace, "_mapped_words", lambda n: torch.zeros(n, dtype=torch.int32)),
        (launch.Kernels, "load", lambda self, instance: types.SimpleNamespace(handle=1)),
        (driver, "cuOccupancyMaxActiveBlocksPerMultiprocessor", lambda *a: (success[0], 4)),
        (driver, "cuOccupancyMaxActiveClusters", lambda *a: (success[0], 132)),
        (launch, "driver_launch", lambda: nothing),
        (driver, "cuLaunchKernelEx", lambda *a: success),  # what older trees launch with
        (OneShot, "available", classmethod(lambda cls, node: None)),
    ):
        setattr(place, name, made)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = MirrorGroup(2)
    group.process_group = dist.group.WORLD
    return Communicator(group, always_native(), max_message_bytes=2**20)


def serve() -> None:
    """A child of ``--stub``: a round for every line it reads."""
    torch.set_num_threads(1)
    communicator = stubbed()
    for turn, _ in enumerate(sys.stdin):
        print(json.dumps(one_round(communicator, turn)), flush=True)


def compared(trees: dict[str, Path], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Rounds of a process per source tree, the processes taking turns."""
    command, pipe = [sys.executable, __file__, "--serve"], subprocess.PIPE
    processes = {}
    for name, tree in trees.items():
        there = os.environ | {"PYTHONPATH": str(tree)}
        processes[name] = subprocess.Popen(command, env=there, stdin=pipe, stdout=pipe, text=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for turn in range(rounds + 1):
        for name, process in processes.items():
            assert process.stdin and process.stdout
            process.stdin.write("round\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if turn:
                found[name].append(answer)
    for process in processes.values():
        process.communicate()
    return found


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and least of every arm, µs."""
    columns = {name: [one[name] for one in rounds] for name in rounds[0]}
    return {
        name: {"median_us": round(median(times), 3), "least_us": round(min(times), 3)}
        for name, times in columns.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--stub", action="store_true", help="without a GPU")
    parser.add_argument("--against", type=Path, help="with --stub: another src/ beside this one")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.serve:
        return serve()
    if arguments.stub:
        trees = {"here": ROOT / "src"}
        if arguments.against:
            trees["against"] = arguments.against.resolve()
        found, device = compared(trees, arguments.rounds), "stub"
    else:
        from tests.ranks import run_ranks

        ranks = run_ranks(on_gpu, 2, arguments.rounds, device="cuda", timeout_s=500.0)
        found = {f"rank {rank}": rounds for rank, rounds in enumerate(ranks)}
        device = torch.cuda.get_device_name()
    result = {name: summary(rounds) for name, rounds in found.items()}
    record: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "device": device,
              "torch": torch.__version__, "python": sys.version.split()[0],
              "shape": f"{NUM_TOKENS}x{HIDDEN_SIZE} bfloat16", "arms": result}  # fmt: skip
    if arguments.against:
        here, there = result["here"], result["against"]
        record["ratios"] = {
            arm: {k: round(one[k] / there[arm][k], 3) for k in one} for arm, one in here.items()
        }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, arms in result.items():
        for arm, one in arms.items():
            print(f"{name:8} {arm:32} {one['median_us']:8.2f} {one['least_us']:8.2f} µs")
    for arm, one in record.get("ratios", {}).items():
        print(f"here / against {arm:32} median {one['median_us']:.2f}, least {one['least_us']:.2f}")
    return None


if __name__ == "__main__":
    main()
