"""What a run of native_kernels.py says about our kernels: ratios against the peers. Pure.

    python benchmarks/native_summary.py native_kernels.json

A row is one path at one shape: ``{"op", "path", "num_tokens", "hidden_size", "message_bytes",
"time_us"}``; ``time_us`` is the median over rounds of the maximum over ranks.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KIB, MIB = 2**10, 2**20
FLASHINFER = "flashinfer.one_shot"
# (from, up to, the most that our time may be of FlashInfer's fused one-shot, geometric mean)
TARGETS = ((4 * KIB, 64 * KIB, 0.55), (128 * KIB, MIB, 0.65), (8 * MIB, 64 * MIB, 0.54))
MOST_OF_BEST_PEER = 1.02
MOST_OF_LINKS = 1.08
MOST_FOR_FP8 = 1.05
MOST_PYTHON_US = 12.0

Row = dict[str, Any]


def by_shape(rows: Iterable[Row], op: str) -> dict[tuple[int, int], dict[str, float]]:
    """(hidden_size, message_bytes) → path → µs, ascending."""
    table: dict[tuple[int, int], dict[str, float]] = {}
    for row in sorted(rows, key=lambda r: (r["hidden_size"], r["message_bytes"])):
        if row["op"] == op:
            shape = row["hidden_size"], row["message_bytes"]
            table.setdefault(shape, {})[row["path"]] = row["time_us"]
    return table


def ours(times: dict[str, float]) -> float | None:
    """The faster of our strategies, without variants and FP8."""
    found = [t for path, t in times.items() if path in ("native.one_shot", "native.two_shot")]
    return min(found, default=None)


def best_peer(times: dict[str, float]) -> tuple[str, float] | None:
    """The fastest path that is not ours."""
    peers = {path: t for path, t in times.items() if not path.startswith("native")}
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def geometric_mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else math.nan


def against_flashinfer(rows: Sequence[Row]) -> list[tuple[int, int, float, float]]:
    """Per target: (from bytes, up to bytes, geometric mean of our time over theirs, target)."""
    table = by_shape(rows, "all_reduce_rms_norm")
    found = []
    for low, high, target in TARGETS:
        ratios = [
            mine / times[FLASHINFER]
            for (_, size), times in table.items()
            if low <= size <= high and FLASHINFER in times and (mine := ours(times)) is not None
        ]
        found.append((low, high, geometric_mean(ratios), target))
    return found


def worst_of_best(rows: Sequence[Row], op: str) -> tuple[float, str]:
    """The largest ratio of our time to the best peer's, and where."""
    worst, where = 0.0, "no peer"
    for (hidden_size, size), times in by_shape(rows, op).items():
        mine, peer = ours(times), best_peer(times)
        if mine is not None and peer is not None and mine / peer[1] > worst:
            worst, where = mine / peer[1], f"{size} bytes, hidden {hidden_size}, against {peer[0]}"
    return worst, where


def worst_of_links(rows: Sequence[Row], bandwidth_gbps: float) -> tuple[float, str]:
    """From 8 MiB on: the largest ratio of our time to message bytes ÷ bandwidth, and where."""
    worst, where = 0.0, "nothing measured from 8 MiB on"
    for (hidden_size, size), times in by_shape(rows, "all_reduce_rms_norm").items():
        mine = ours(times)
        if size >= 8 * MIB and mine is not None:
            ratio = mine / (size / bandwidth_gbps / 1e3)
            if ratio > worst:
                worst, where = ratio, f"{size} bytes, hidden {hidden_size}"
    return worst, where


def worst_of_fp8(rows: Sequence[Row]) -> tuple[float, str]:
    """The largest ratio of a call with FP8 output to the same call without."""
    worst, where = 0.0, "no FP8 measured"
    for (hidden_size, size), times in by_shape(rows, "all_reduce_rms_norm").items():
        for path, time_us in times.items():
            plain = times.get(path.split("+fp8")[0])
            if "+fp8" in path and plain and time_us / plain > worst:
                worst, where = time_us / plain, f"{path}, {size} bytes, hidden {hidden_size}"
    return worst, where


def summary(rows: Sequence[Row], bandwidth_gbps: float, python_us: float) -> list[str]:
    """One line per target: what was reached, what was wanted, and where it was worst."""
    lines = [
        _line(f"time / {FLASHINFER}, {low // KIB} to {high // KIB} KiB (geometric mean)",
              ratio, target, "")
        for low, high, ratio, target in against_flashinfer(rows)
    ]  # fmt: skip
    for op in ("all_reduce_rms_norm", "all_reduce"):
        worst, where = worst_of_best(rows, op)
        lines.append(_line(f"{op}: worst time / best peer", worst, MOST_OF_BEST_PEER, where))
    worst, where = worst_of_links(rows, bandwidth_gbps)
    label = f"worst time / (bytes / {bandwidth_gbps:.0f} GB/s), from 8 MiB"
    lines.append(_line(label, worst, MOST_OF_LINKS, where))
    worst, where = worst_of_fp8(rows)
    lines.append(_line("FP8 output / bf16 output, worst", worst, MOST_FOR_FP8, where))
    lines.append(_line("Python per eager call, us", python_us, MOST_PYTHON_US, ""))
    return lines


def _line(label: str, value: float, most: float, where: str) -> str:
    verdict = "not measured" if not value > 0 else "ok" if value <= most else "MISSED"
    return f"{label:<64} {value:7.3f}  <= {most:<5g} {verdict}" + (f"  ({where})" if where else "")


if __name__ == "__main__":
    run = json.loads(Path(sys.argv[1]).read_text())
    print("\n".join(summary(run["rows"], run["bandwidth_gbps"], run["python_us"])))
