"""Chrome traces of vLLM's workers → GPU time by kernel. Pure; imports neither torch nor vLLM.

A kernel belongs to ``all_reduce_norm`` by its name: the all-reduces of every provider, the fused
kernels, and norm kernels, among them the ones Inductor makes (they carry ``rsqrt``). That also
takes in a model's own q and k norms, which are the same in every arm: only differences count.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ALL_REDUCE = re.compile(
    r"all_?reduce|cross_device_reduce|one_?shot|two_?shot|multimem|fusewise_", re.IGNORECASE
)
_NORM = re.compile(r"rms|rsqrt|norm_kernel", re.IGNORECASE)
_RANK = re.compile(r"rank_?(\d+)")

Kernels = dict[str, dict[str, float]]  # name → {"count", "total_us"}


def belongs(name: str) -> bool:
    """Whether a kernel is part of all-reduce + residual + RMSNorm."""
    return bool(_ALL_REDUCE.search(name) or _NORM.search(name))


def read_kernels(trace: Path) -> Kernels:
    """Device time of every kernel in one rank's trace, by name.

    Raises:
        ValueError: the trace holds no kernel: the profiler saw no GPU work.
    """
    content = trace.read_bytes()
    if trace.suffix == ".gz":
        content = gzip.decompress(content)
    events = json.loads(content)["traceEvents"]
    kernels: Kernels = {}
    for event in events:
        if event.get("cat") == "kernel":
            entry = kernels.setdefault(event["name"], {"count": 0, "total_us": 0.0})
            entry["count"] += 1
            entry["total_us"] += event["dur"]
    if not kernels:
        raise ValueError(f"{trace} holds no kernel")
    return kernels


def difference(whole: Kernels, part: Kernels) -> Kernels:
    """``whole`` minus ``part``: a run of many steps minus its first, per kernel."""
    nothing = {"count": 0, "total_us": 0.0}
    return {
        name: {
            "count": entry["count"] - part.get(name, nothing)["count"],
            "total_us": entry["total_us"] - part.get(name, nothing)["total_us"],
        }
        for name, entry in whole.items()
    }


def summary(kernels: Kernels, steps: int = 1) -> dict[str, Any]:
    """GPU time of one step: all of it, all-reduce + norm, and those kernels by name."""
    chosen = {name: entry for name, entry in kernels.items() if belongs(name)}
    return {
        "total_us": _total(kernels.values()) / steps,
        "all_reduce_norm_us": _total(chosen.values()) / steps,
        "kernels": [
            {"name": name, "count": e["count"] / steps, "time_us": e["total_us"] / steps}
            for name, e in sorted(chosen.items(), key=lambda item: -item[1]["total_us"])
        ],
    }


def _total(entries: Iterable[Mapping[str, float]]) -> float:
    return sum(entry["total_us"] for entry in entries)


def newest_by_rank(folder: Path, after_ns: int) -> dict[int, Path]:
    """Each rank's latest trace in a folder, of those written after a moment.

    Args:
        folder: where the workers' profilers write.
        after_ns: as ``time.time_ns()``.
    """
    found: dict[int, Path] = {}
    for trace in sorted(folder.glob("*.json*"), key=lambda file: file.stat().st_mtime_ns):
        match = _RANK.search(trace.name)
        if match and trace.stat().st_mtime_ns > after_ns:
            found[int(match[1])] = trace
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    """Minimum, quartiles and count; each quartile is one of the values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    names = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75}
    return {name: ordered[int(share * last)] for name, share in names.items()} | {
        "rounds": len(ordered)
    }


def first_divergence(left: list[list[int]], right: list[list[int]]) -> list[int | None]:
    """Per prompt, the first output token at which two arms differ; None where they agree."""
    return [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None)
        for x, y in zip(left, right, strict=True)
    ]
