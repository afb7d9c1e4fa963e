"""Our kernels, FlashInfer's and the floor, with W ranks on one GPU: latency without a second GPU.

    python benchmarks/virtual_node.py --out virtual_node.json
    python benchmarks/virtual_node.py --world-sizes 2 --hidden-sizes 2048 --rounds 7   # quick

One process, one stream and one CUDA graph of many calls per rank; all graphs start at one event.
Two patterns: ``chain``, calls one behind the other as dependent launches, and ``in_place``, a GEMM
of torch.mm (no dependent launch) before each call, the GEMMs' time subtracted within the round.
All ranks' slots lie in one GPU's memory: latencies compare in kind with NVLink, bandwidths do not.
torch's symmetric memory needs a process per rank and is left out. Ratios hold within one run only.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # one hardware queue per stream

import torch
from virtual_arms import Arm, Node, Patch, flashinfer, floor, launch_shape, native
from virtual_floors import FLOORS
from virtual_streams import streams_of
from virtual_summary import tables, targets

from fusewise.backends.native.instance import Instance, vectors_per_row
from fusewise.profiles.intervals import median_interval
from fusewise.shape import Shape

REFERENCE = "flashinfer.one_shot"
PATTERNS = ("chain", "in_place")
SLEEP_CYCLES = 120_000  # a rank: all graphs are enqueued before the first starts
ROOM = 132 * 1024  # threads of our blocks that may wait at once, all ranks together
Row = dict[str, Any]
Point = tuple[int, Shape]  # world_size, shape
Key = tuple[str, Instance]  # the patch's name


def patches_of(arguments: argparse.Namespace) -> dict[str, Patch]:
    """The kernels to time, by name: the shipped ones, then those of ``--patches``."""
    found = {
        "native.one_shot": Patch("one_shot"),
        "native.one_shot:early": Patch("one_shot", instance={"early_trigger": True}),
        "native.two_shot": Patch("two_shot"),
        "native.two_shot:early": Patch("two_shot", instance={"early_trigger": True}),
        **{name: floor(name) for name in FLOORS},
    }
    if arguments.patches:
        described = json.loads(Path(arguments.patches).read_text())
        for name, one in described.items():
            edits = tuple((file, old, new) for file, old, new in one.pop("edits", ()))
            found[name] = Patch(edits=edits, **one)
    wanted = arguments.arms.split(",") if arguments.arms else None
    return {n: p for n, p in found.items() if not wanted or any(w in n for w in wanted)}


def points_of(arguments: argparse.Namespace) -> Iterator[Point]:
    for world_size in arguments.world_sizes:
        for hidden_size in arguments.hidden_sizes:
            sizes = {max(1, round(kib * 512 / hidden_size)) for kib in arguments.kib}
            for num_tokens in sorted(sizes):
                shape = Shape(num_tokens, hidden_size, arguments.dtype)
                if world_size * num_tokens * math.ceil(vectors_per_row(shape) / 128) * 128 <= ROOM:
                    yield world_size, shape


class Codes:
    """Machine code by patch and instance, compiled side by side before anything runs."""

    def __init__(self, sm: int, patches: dict[str, Patch]) -> None:
        self.sm, self._patches = sm, patches
        self._made: dict[Key, bytes] = {}

    def compile(self, points: list[Point]) -> int:
        """Everything that the points need; says what cannot be compiled."""
        import cuda.core  # noqa: F401  once, before threads do

        shapes = {
            (name, launch_shape(patch, shape, world_size, self.sm))
            for world_size, shape in points
            for name, patch in self._patches.items()
            if patch.kernel == "one_shot" or world_size > 2
        }
        keys = {(n, one.instance) for n, launch in shapes for one in (launch, launch.looped())}
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            codes = {k: pool.submit(self._patches[k[0]].machine_code, k[1], self.sm) for k in keys}
        for key, code in codes.items():
            if error := code.exception():
                print(f"# {key[0]}: {str(error)[:600]}", flush=True)
            else:
                self._made[key] = code.result()
        return len(keys)

    def of(self, name: str, instance: Instance) -> bytes:
        return self._made[name, instance]


def arms_of(
    node: Node, patches: dict[str, Patch], codes: Codes, arguments: argparse.Namespace
) -> list[Arm]:
    """Every arm that takes this point; says which does not and why."""
    makers: list[tuple[str, Callable[[], Arm]]] = []
    for name, patch in patches.items():
        if patch.kernel == "two_shot" and node.world_size == 2:
            continue
        make = functools.partial(native, node, name, patch)
        makers.append((name, functools.partial(make, functools.partial(codes.of, name))))
    if arguments.flashinfer:
        for name in (REFERENCE, f"{REFERENCE}:early", "flashinfer.two_shot"):
            if "two_shot" not in name or (
                arguments.two_shot and node.shape.num_tokens > node.world_size
            ):
                makers.append((name, functools.partial(flashinfer, node, name)))
    arms = []
    for name, make in makers:
        try:
            arms.append(make())
        except Exception as error:  # an arm that cannot be built costs its own numbers only
            print(f"# {name} at {node.shape}: {type(error).__name__} {error!s:.160}", flush=True)
    return arms


def captured(node: Node, call: Callable[[int], None], calls: int) -> list[torch.cuda.CUDAGraph]:
    """One graph of ``calls`` calls per rank."""
    graphs = []
    for rank, stream in enumerate(node.streams):
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="relaxed")
            for _ in range(calls):
                call(rank)
            graph.capture_end()
        graphs.append(graph)
    return graphs


def replay_us(node: Node, graphs: list[torch.cuda.CUDAGraph]) -> float:
    """µs from the common start until the last rank has ended."""
    gate = torch.cuda.Event()
    torch.cuda._sleep(SLEEP_CYCLES * (1 + node.world_size))
    gate.record()
    starts = [torch.cuda.Event(enable_timing=True) for _ in graphs]
    ends = [torch.cuda.Event(enable_timing=True) for _ in graphs]
    for stream, graph, start, end in zip(node.streams, graphs, starts, ends, strict=True):
        with torch.cuda.stream(stream):
            stream.wait_event(gate)
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return 1000 * max(starts[0].elapsed_time(end) for end in ends)


def checked(node: Node, arm: Arm) -> str:
    """Runs an arm three times; what is wrong with it, empty if nothing."""
    for _ in range(3):
        node.poison()
        torch.cuda.synchronize()
        for rank, stream in enumerate(node.streams):
            with torch.cuda.stream(stream):
                arm.call(rank)
        torch.cuda.synchronize()
        if arm.dead():
            return "a rank waited in vain"
        if not arm.is_floor and (problem := node.wrong()):
            return problem
    return ""


def timed(
    node: Node, arms: list[Arm], pattern: str, calls: int, rounds: int
) -> dict[str, list[float]]:
    """µs per call and arm, one number a round, the arms taking turns."""

    def behind_gemm(arm: Arm) -> Callable[[int], None]:
        return lambda rank: (node.gemm(rank), arm.call(rank))[0]

    in_place = pattern == "in_place"
    graphs = {
        arm.name: captured(node, behind_gemm(arm) if in_place else arm.call, calls) for arm in arms
    }
    if in_place:
        graphs["gemm"] = captured(node, node.gemm, calls)
    dead = {arm.name: arm.dead for arm in arms}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = random.Random(0)
    for turn in range(rounds + 1):
        # A new order every round: a rotated one gives each arm the same predecessor nearly always.
        for name in order.sample(list(graphs), len(graphs)):
            took = replay_us(node, graphs[name]) / calls
            if turn:
                times[name].append(math.nan if name in dead and dead[name]() else took)
    gemm = times.pop("gemm", [0.0] * rounds)
    return {
        name: [a - b for a, b in zip(found, gemm, strict=True)] for name, found in times.items()
    }


def measure(point: Point, patches: dict[str, Patch], codes: Codes, streams: list[Any],
            arguments: argparse.Namespace) -> list[Row]:  # fmt: skip
    """All arms at one point, checked, then timed in both patterns."""
    world_size, shape = point
    node, rows = Node(world_size, shape, streams), []
    for rank in range(world_size):
        with torch.cuda.stream(node.streams[rank]):
            saved = node.x[rank].clone()
            node.gemm(rank)
            node.x[rank].copy_(saved)
    torch.cuda.synchronize()
    arms = []
    for arm in arms_of(node, patches, codes, arguments):
        if problem := checked(node, arm):
            print(f"# {arm.name} at {world_size} x {shape} ({arm.note}): {problem}", flush=True)
        else:
            arms.append(arm)
    for pattern in arguments.patterns:
        calls = arguments.calls if pattern == "chain" else arguments.calls // 2
        times = timed(node, arms, pattern, calls, arguments.rounds)
        base = times.get(REFERENCE)
        for arm in arms:
            found = median_interval(times[arm.name])
            row = {"pattern": pattern, "world_size": world_size, "hidden_size": shape.hidden_size,
                   "num_tokens": shape.num_tokens, "message_bytes": shape.message_bytes,
                   "dtype": shape.dtype, "arm": arm.name, "launch": arm.note,
                   "time_us": found.median, "low_us": found.low, "high_us": found.high}  # fmt: skip
            if base:
                ratio = median_interval([a / b for a, b in zip(times[arm.name], base, strict=True)])
                row |= {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[2048, 2880, 4096, 7168])
    parser.add_argument(
        "--kib", type=float, nargs="+", default=[4, 8, 16, 32, 64, 128, 256, 512, 1024]
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--arms", default="", help="only arms whose name contains one of these")
    parser.add_argument(
        "--patches", help="JSON: name -> Patch's fields, timed beside the shipped kernels"
    )
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument(
        "--calls", type=int, default=100, help="in one graph of the chain; half in place"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-flashinfer", dest="flashinfer", action="store_false")
    parser.add_argument("--two-shot", action="store_true", help="FlashInfer's two-shot too")
    parser.add_argument(
        "--shared-sms", dest="partition", action="store_false",
        help="let all ranks run on all multiprocessors, not each on its own share",
    )  # fmt: skip
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def command() -> str:
    """This run's command line, without the folders of this machine."""
    words = (Path(word).name if word.startswith("/") else word for word in sys.argv)
    return " ".join(["python", *words])


def main() -> None:
    arguments, begin = parse(), time.time()
    facts = torch.cuda.get_device_properties(0)
    patches, points = patches_of(arguments), list(points_of(arguments))
    codes = Codes(10 * facts.major + facts.minor, patches)
    print(f"# compiled {codes.compile(points)} in {time.time() - begin:.0f} s", flush=True)
    streams = {w: streams_of(w, arguments.partition) for w in arguments.world_sizes}
    node = {"gpu": facts.name, "torch": torch.__version__, "cuda": torch.version.cuda}
    record: dict[str, Any] = {"command": command(), "node": node, "rows": []}
    for point in points:
        record["rows"] += measure(point, patches, codes, streams[point[0]], arguments)
        record["took_s"] = round(time.time() - begin, 1)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"# took {record['took_s']} s")
    print("\n".join([*tables(record["rows"]), "", *targets(record["rows"])]))


if __name__ == "__main__":
    main()
