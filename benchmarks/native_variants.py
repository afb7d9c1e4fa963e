"""The one-shot kernel's variants and patched copies of it beside FlashInfer's, on real GPUs.

    torchrun --nproc-per-node 2 benchmarks/native_variants.py patches.json --out variants.json

``patches.json`` is as virtual_node.py takes it: ``{name: {"kernel": "one_shot", "edits": [[file,
old text, new text], ...], "variant": {"vectors": 1, "blocks": 4}}}``; with neither, it is the
shipped kernel. ``--floors`` adds virtual_node.py's. Each kernel is verified at each shape, then all
take turns. Prints geometric means over FlashInfer's time and, at 8 KiB, times over the floors'.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from native_summary import FLASHINFER, KIB, MIB, geometric_mean
from virtual_arms import Patch, floor, launch_shape
from virtual_floors import FLOORS

from fusewise.backends.native.cuda import prepare
from fusewise.backends.native.cuda.launch import Kernels
from fusewise.backends.native.instance import Instance
from fusewise.backends.native.strategies import OneShot
from fusewise.backends.steps import build_backend
from fusewise.errors import InputError
from fusewise.profiles.intervals import median_interval
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.shape import Shape
from fusewise.tune.operands import usual
from fusewise.tune.timing import Arena, Buffers, Runner, interleave
from fusewise.tune.verify import check

RANGES = ((4 * KIB, 64 * KIB), (128 * KIB, MIB), (2 * MIB, 64 * MIB))


def backend_of(name: str, patch: Patch) -> type[OneShot]:
    """A backend that runs the patched kernel."""

    class Patched(Kernels):
        @functools.cache  # noqa: B019  one device, as long as the process
        def machine_code(self, instance: Instance) -> bytes:
            return patch.machine_code(instance, self.sm)

    def kernel(shape: Shape, world_size: int, sm: int, *rest: Any) -> Any:
        _, params = prepare.one_shot(shape, world_size, sm, *rest)
        return launch_shape(patch, shape, world_size, sm), params

    def opened(self: OneShot) -> Kernels:
        facts = torch.cuda.get_device_properties(self.group.device)
        return Patched(10 * facts.major + facts.minor, facts.multi_processor_count)

    members = {"id": name, "kernel": staticmethod(kernel), "_open_device": opened}
    return type(f"Patched_{name}", (OneShot,), members)


def measure(group: Group, backends: list[Any], buffers: Buffers, rounds: int) -> dict[str, float]:
    """Median µs of every path that is right at this shape."""
    runners = []
    for backend in backends:
        if backend.id in FLOORS:  # they compute nothing
            runners.append(Runner(backend, "all_reduce_rms_norm", buffers))
            continue
        try:
            found = check(backend, group, usual("all_reduce_rms_norm", buffers.shape, 1))
        except InputError as error:  # the same on all ranks: too wide a row for it
            print(f"{backend.id} at {buffers.shape}: {error}")
            continue
        if max(group.gather("wrong", found.wrong)):
            print(f"{backend.id} is wrong at {buffers.shape}")
            continue
        runners.append(Runner(backend, "all_reduce_rms_norm", buffers))
    times = interleave(group, runners, rounds)
    return {path: median_interval(times_us).median for path, times_us in times.items()}


def means(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for low, high in RANGES:
        part = [row for row in rows if low <= row["message_bytes"] <= high]
        for path in dict.fromkeys(path for row in part for path in row["times_us"]):
            both = [row["times_us"] for row in part if path in row["times_us"]]
            mean = geometric_mean([times[path] / times[FLASHINFER] for times in both])
            lines.append(f"{low // KIB:6}K to {high // KIB:6}K  {path:<24} {mean:.3f}")
    return lines


def over_floors(rows: list[dict[str, Any]]) -> list[str]:
    """What each path takes at 8 KiB, over the floors with either trigger."""
    names, lines = [name for name in FLOORS if name != "empty"], []
    for row in rows:
        times_us = row["times_us"]
        if row["message_bytes"] != 8 * KIB or not times_us.keys() >= set(names):
            continue
        lines.append(f"{row['num_tokens']} x {row['hidden_size']}, µs, over {', '.join(names)}")
        for path, time_us in times_us.items():
            ratios = "".join(f"{time_us / times_us[name]:6.2f}" for name in names)
            lines.append(f"  {path:<24} {time_us:6.2f}{ratios}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patches", type=Path)
    parser.add_argument("--out", type=Path, default=Path("native_variants.json"))
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[2048, 4096, 7168])
    parser.add_argument("--kib", type=int, nargs="+", default=[2**i for i in range(2, 14)])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--floors", action="store_true", help="the floors as well")
    arguments = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = Group(timeout_s=100.0)
    node = fingerprint_of(group)
    most = Shape(
        max(arguments.kib) * 512 // min(arguments.hidden_sizes) + 1, max(arguments.hidden_sizes)
    )
    patches = {
        name: Patch(edits=tuple(map(tuple, one.pop("edits", ()))), **one)
        for name, one in json.loads(arguments.patches.read_text()).items()
    }
    if arguments.floors:
        patches |= {name: floor(name) for name in FLOORS}
    flashinfer, reason = build_backend(FLASHINFER, group, node, most)
    if flashinfer is None:
        sys.exit(f"native_variants: {reason}")
    backends = [flashinfer, *(backend_of(*item)(group, most) for item in patches.items())]
    arena, rows = Arena(group, most), []
    for hidden_size in arguments.hidden_sizes:
        for tokens in sorted({max(1, round(kib * 512 / hidden_size)) for kib in arguments.kib}):
            buffers = Buffers(arena, Shape(tokens, hidden_size))
            times_us = measure(group, backends, buffers, arguments.rounds)
            shape = {"hidden_size": hidden_size, "num_tokens": tokens}
            rows.append({**shape, "message_bytes": 2 * hidden_size * tokens, "times_us": times_us})
    if rank == 0:
        command = " ".join(["torchrun", *sys.argv])
        record = {"command": command, "node": node.model_dump(mode="json"), "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print("\n".join([*means(rows), *over_floors(rows)]))
    for backend in backends:
        backend.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
