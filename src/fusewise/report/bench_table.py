"""A run's samples → rows with the columns of nccl-tests, and its header. Pure.

Columns, order and units follow nccl-tests' output: size in bytes, count in elements, time in µs,
bandwidths in GB/s (1e9 bytes), ``#wrong`` the number of wrong elements. Ours are the hidden size,
the tokens, the path (where nccl-tests has redop and root) and the spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusewise.node import Fingerprint
from fusewise.operation import OPERATIONS, Op
from fusewise.profiles.intervals import CONFIDENCE, median_interval
from fusewise.profiles.schema import Sample
from fusewise.report.table import Column, Section
from fusewise.shape import DType, Shape
from fusewise.tune.settings import Settings

BENCH_COLUMNS = (
    Column("hidden_size", "hidden", align="right", drop=20),
    Column("num_tokens", "tokens", align="right", drop=40),
    Column("size_bytes", "size\n(B)", align="right"),
    Column("count", "count\n(elements)", align="right", drop=60),
    Column("type", "type", drop=50),
    Column("path", "path"),
    Column("time_us", "time\n(us)", form=".2f", align="right"),
    Column("spread", "spread\n(±)", form=".1%", align="right"),
    Column("algbw_gb_per_s", "algbw\n(GB/s)", form=".2f", align="right", drop=30),
    Column("busbw_gb_per_s", "busbw\n(GB/s)", form=".2f", align="right"),
    Column("wrong", "#wrong", align="right"),
)
_NOTES = (
    "time: median per call, slowest rank; spread: half its "
    f"{CONFIDENCE:.0%} interval over the rounds, as a share of it.",
    "busbw = algbw · 2(n−1)/n for both operations.",
)


def header(settings: Settings, node: Fingerprint) -> str:
    """What nccl-tests prints first: what runs, and on which devices."""
    graph = int(node.device_type == "cuda")
    return (
        f"# nRanks {node.world_size} minBytes {settings.min_bytes} maxBytes {settings.max_bytes} "
        f"step: 2(factor)\n"
        f"# iters: {settings.rounds} interleaved rounds validation: 1 graph: {graph}\n"
        f"# Using devices\n"
        f"#  Ranks 0-{node.world_size - 1} on {node.nodes} node(s), {node.fabric}: {node.device}"
    )


def bench(
    samples: Iterable[Sample],
    dtype: DType,
    world_size: int,
    wrong: Mapping[tuple[Op, str, int, int], int] | None = None,
    head: str = "",
) -> list[Section]:
    """A section per operation; one row per sample, by hidden size, message size and path.

    Args:
        samples: timings of one run.
        dtype: of the tensors.
        world_size: ranks that took part.
        wrong: (op, path, num_tokens, hidden_size) → wrong elements; a missing key was not checked
            and shows as an empty cell.
        head: lines above the first section.
    """
    checked = wrong or {}
    ordered = sorted(samples, key=lambda s: (s.hidden_size, s.num_tokens, s.path))
    ops = [op for op in OPERATIONS if any(sample.op == op for sample in ordered)]
    sections = []
    for op in ops:
        records = [
            bench_record(
                Shape(s.num_tokens, s.hidden_size, dtype),
                s,
                world_size,
                checked.get((op, s.path, s.num_tokens, s.hidden_size)),
            )
            for s in ordered
            if s.op == op
        ]
        title = f"{head}\n#\n# {op}" if head and op == ops[0] else f"# {op}"
        notes = _NOTES if op == ops[-1] else ()
        data = [{k: v for k, v in record.items() if k != "spread"} for record in records]
        sections.append(Section("bench", BENCH_COLUMNS, records, title, notes, data))
    return sections


def bench_record(
    shape: Shape, sample: Sample, world_size: int, wrong: int | None
) -> dict[str, Any]:
    """One row. ``algbw`` is message bytes over time, ``busbw`` that times ``bus_factor``."""
    span = median_interval(sample.times_us)
    algbw_gb_per_s = shape.message_bytes / span.median / 1e3  # bytes per µs are MB/s
    return {
        "hidden_size": shape.hidden_size,
        "num_tokens": shape.num_tokens,
        "size_bytes": shape.message_bytes,
        "count": shape.num_tokens * shape.hidden_size,
        "type": shape.dtype,
        "op": sample.op,
        "path": sample.path,
        "time_us": span.median,
        "time_low_us": span.low,
        "time_high_us": span.high,
        "spread": (span.high - span.low) / 2 / span.median,
        "algbw_gb_per_s": algbw_gb_per_s,
        "busbw_gb_per_s": algbw_gb_per_s * bus_factor(world_size),
        "wrong": wrong,
        "world_size": world_size,
    }


def bus_factor(world_size: int) -> float:
    """2(n−1)/n, nccl-tests' factor for an all-reduce by point-to-point sends.

    Sources: nccl-tests doc/PERFORMANCE.md, section AllReduce; ``AllReduceGetBw`` in
    src/all_reduce.cu. nccl-tests uses (n−1)/(n+1) where the switch reduces (NVLS); here one
    factor serves all paths, so that rows compare, and a multimem path may exceed the links.
    """
    return 2 * (world_size - 1) / world_size
