"""A run's samples → rows with the columns of nccl-tests. Pure.

Columns, order and units follow nccl-tests' output: size in bytes, count in elements, time in µs,
bandwidths in GB/s (1e9 bytes), ``#wrong`` the number of wrong elements. Two columns are ours: the
operation and the path, where nccl-tests has redop and root.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusewise.operation import Op
from fusewise.profiles.intervals import median
from fusewise.profiles.schema import Sample
from fusewise.report.table import Column, Section
from fusewise.shape import DType, Shape

BENCH_COLUMNS = (
    Column("size_bytes", "size", "B", align="right"),
    Column("count", "count", align="right"),
    Column("type", "type"),
    Column("op", "op"),
    Column("path", "path"),
    Column("time_us", "time", "µs", ".2f", "right"),
    Column("algbw_gbps", "algbw", "GB/s", ".2f", "right"),
    Column("busbw_gbps", "busbw", "GB/s", ".2f", "right"),
    Column("wrong", "#wrong", align="right"),
)


def bench(
    samples: Iterable[Sample],
    dtype: DType,
    world_size: int,
    wrong: Mapping[tuple[Op, str, int, int], int] | None = None,
) -> Section:
    """One row per sample, by hidden size, message size, operation and path.

    Args:
        samples: timings of one run.
        dtype: of the tensors.
        world_size: ranks that took part.
        wrong: (op, path, num_tokens, hidden_size) → wrong elements; a missing key was not checked
            and shows as an empty cell.
    """
    checked = wrong or {}
    ordered = sorted(samples, key=lambda s: (s.hidden_size, s.num_tokens, s.op, s.path))
    records = [
        bench_record(
            Shape(s.num_tokens, s.hidden_size, dtype),
            s.op,
            s.path,
            median(s.times_us),
            world_size,
            checked.get((s.op, s.path, s.num_tokens, s.hidden_size)),
        )
        for s in ordered
    ]
    note = "time: median per call, slowest rank; busbw = algbw · 2(n−1)/n for both operations."
    return Section("bench", BENCH_COLUMNS, records, None, (note,))


def bench_record(
    shape: Shape, op: Op, path: str, time_us: float, world_size: int, wrong: int | None
) -> dict[str, Any]:
    """One row. ``algbw`` is message bytes over time, ``busbw`` that times ``bus_factor``."""
    algbw_gbps = shape.message_bytes / time_us / 1e3  # bytes per µs are MB/s
    return {
        "size_bytes": shape.message_bytes,
        "count": shape.num_tokens * shape.hidden_size,
        "type": shape.dtype,
        "op": op,
        "path": path,
        "time_us": time_us,
        "algbw_gbps": algbw_gbps,
        "busbw_gbps": algbw_gbps * bus_factor(world_size),
        "wrong": wrong,
        "num_tokens": shape.num_tokens,
        "hidden_size": shape.hidden_size,
        "world_size": world_size,
    }


def bus_factor(world_size: int) -> float:
    """2(n−1)/n, nccl-tests' factor for an all-reduce by point-to-point sends.

    Sources: nccl-tests doc/PERFORMANCE.md, section AllReduce; ``AllReduceGetBw`` in
    src/all_reduce.cu. nccl-tests uses (n−1)/(n+1) where the switch reduces (NVLS); here one
    factor serves all paths, so that rows compare, and a multimem path may exceed the links.
    """
    return 2 * (world_size - 1) / world_size
