"""What the virtual node and the model predict for 2, 4 or 8 GPUs, beside what was measured.

    python benchmarks/virtual_vs_real.py virtual_node.json profile.json native_kernels.json
    python benchmarks/virtual_vs_real.py virtual_node.json     # predictions alone

Prints a table in Markdown per measurement: a profile, or what native_kernels.py wrote. Never
measures. Times are microseconds of one fused call in a chain of calls, the fastest of the paths
that a plan can name; a prediction of the virtual node between two of its sizes is interpolated, and
beyond them there is none. Ratios to FlashInfer travel between hosts better than times do.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from native_summary import KIB, MIB, geometric_mean

from fusewise.profiles.intervals import median
from fusewise.shape import Shape, format_size

# The model of docs/kernels.md. At two ranks alpha and beta come from two H200s, so there the model
# is a fit (benchmarks/results/two_gpus); the rest is predicted: alpha by what one-shot took longer
# on four and eight virtual ranks, delta by what two-shot did (benchmarks/results/one_gpu).
ALPHA_US = {2: 2.2, 4: 2.6, 8: 3.2}
DELTA_US = {4: 0.7, 8: 0.7}
BETA_GBPS = 358.0
# FlashInfer's one-shot, a line through what vLLM issue 44079 reports of it for eight H200s (the
# profile nvidia-h200-tp8), every rank sending the message to every peer. Extrapolated elsewhere.
FLASHINFER_ALPHA_US, FLASHINFER_BETA_GBPS = 5.9, 306.0
CHAIN = "chain"  # the pattern of virtual_node.py that a tune times: call behind call in a graph
KIB_SHOWN = (4, 16, 64, 256, 1024, 4096, 16384, 65536)
CLASSES = ((0, 64 * KIB), (64 * KIB + 1, MIB), (MIB + 1, 2**40))  # for the means, in bytes
COLUMNS = ("GPUs", "hidden", "message", "virtual µs", "model µs", "measured µs",
           "virtual ÷ FlashInfer", "model ÷ FlashInfer", "measured ÷ FlashInfer")  # fmt: skip


class Point(NamedTuple):
    """Where a call is timed."""

    world_size: int
    hidden_size: int
    message_bytes: int


class Pair(NamedTuple):
    """Our fastest and FlashInfer's fastest fused call at one point, µs; None where not known."""

    native_us: float | None
    flashinfer_us: float | None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        if self.native_us is None or self.flashinfer_us is None:
            return None
        return self.native_us / self.flashinfer_us


UNKNOWN = Pair(None, None)
Times = dict[Point, Pair]


class Row(NamedTuple):
    """A point, predicted twice and measured."""

    point: Point
    virtual: Pair
    model: Pair
    measured: Pair


def pair_of(times_us: Mapping[str, float]) -> Pair:
    """The fastest of each side, its variants included.

    Not counted: FP8 outputs, which are another operation, and the early trigger, which wins in a
    chain only and which no plan names.
    """
    plain = {n: t for n, t in times_us.items() if "+fp8" not in n and "early" not in n}
    sides = [[t for n, t in plain.items() if n.startswith(s)] for s in ("native.", "flashinfer.")]
    return Pair(*(min(side, default=None) for side in sides))


def _pairs(found: Iterable[tuple[Point, str, float]]) -> Times:
    table: dict[Point, dict[str, float]] = {}
    for point, path, time_us in found:
        table.setdefault(point, {})[path] = time_us
    return {point: pair_of(times) for point, times in sorted(table.items())}


def virtual_times(document: Mapping[str, Any], pattern: str = CHAIN) -> Times:
    """What virtual_node.py wrote, in one of its patterns."""
    return _pairs(
        (Point(r["world_size"], r["hidden_size"], r["message_bytes"]), r["arm"], r["time_us"])
        for r in document["rows"]
        if r["pattern"] == pattern
    )


def measured_times(document: Mapping[str, Any]) -> Times:
    """Of a profile, or of what native_kernels.py wrote: the fused operation's."""
    ranks, op = document["fingerprint"]["world_size"], "all_reduce_rms_norm"
    if "rows" in document:
        rows = [r for r in document["rows"] if r["op"] == op]
        sizes = [r["message_bytes"] for r in rows]
    else:
        rows = [r for r in document["samples"] if r.get("op", op) == op]
        dtype = document["dtype"]
        sizes = [Shape(r["num_tokens"], r["hidden_size"], dtype).message_bytes for r in rows]
    return _pairs(
        (Point(ranks, row["hidden_size"], size), row["path"], median(row["times_us"]))
        for row, size in zip(rows, sizes, strict=True)
    )


def model(point: Point) -> Pair:
    """What the model says: the better of our strategies, and FlashInfer's one-shot."""
    ranks, size = point.world_size, point.message_bytes / 1e3  # bytes ÷ GB/s = ns
    ours = ALPHA_US[ranks] + (ranks - 1) * size / BETA_GBPS
    if ranks > 2:
        two_shot = ALPHA_US[ranks] + DELTA_US[ranks] + 2 * (ranks - 1) / ranks * size / BETA_GBPS
        ours = min(ours, two_shot)
    theirs = FLASHINFER_ALPHA_US + (ranks - 1) * size / FLASHINFER_BETA_GBPS
    return Pair(ours, theirs)


def virtual_at(times: Times, point: Point) -> Pair:
    """The virtual node's times at a point, on the line between its neighbours in size."""
    mine = [(p.message_bytes, pair) for p, pair in times.items() if p[:2] == point[:2]]
    below = max((one for one in mine if one[0] <= point.message_bytes), default=None)
    above = min((one for one in mine if one[0] >= point.message_bytes), default=None)
    if below is None or above is None:
        return UNKNOWN
    share = (point.message_bytes - below[0]) / max(1, above[0] - below[0])
    return Pair(
        *(
            None if low is None or high is None else low + share * (high - low)
            for low, high in zip(below[1], above[1], strict=True)
        )
    )


def compared(virtual: Times, measured: Times) -> list[Row]:
    """A row per measured point; per point of the virtual node where nothing is measured at all."""
    return [
        Row(p, virtual_at(virtual, p), model(p), measured.get(p, UNKNOWN))
        for p in sorted(measured or virtual)
    ]


def shown(rows: Sequence[Row], hidden_sizes: Sequence[int], kib: Sequence[float]) -> list[Row]:
    """Of every group and asked hidden size the row next to each asked size, within an eighth."""
    picked = {}
    for ranks in sorted({row.point.world_size for row in rows}):
        for hidden_size in hidden_sizes:
            part = [row for row in rows if row.point[:2] == (ranks, hidden_size)]
            for size in (one * KIB for one in kib):
                distance = {row: abs(row.point.message_bytes - size) for row in part}
                near = min(part, key=distance.__getitem__, default=None)
                if near is not None and distance[near] <= size / 8:
                    picked[near] = None
    return list(picked)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown, a line per row."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for point, *pairs in rows:
        cells = [str(point.world_size), str(point.hidden_size), format_size(point.message_bytes)]
        cells += [_number(pair.native_us, 1) for pair in pairs]
        cells += [_number(pair.ratio, 2) for pair in pairs]
        yield f"| {' | '.join(cells)} |"


def means(rows: Sequence[Row]) -> Iterator[str]:
    """Geometric means by group and class of sizes: how far both predictions were off."""
    for ranks in sorted({row.point.world_size for row in rows}):
        for low, high in CLASSES:
            part = [
                row
                for row in rows
                if row.point.world_size == ranks and low <= row.point.message_bytes <= high
            ]
            for name, predicted in (("virtual", 1), ("model", 2)):
                both = [(row.measured, row[predicted]) for row in part]
                times = [m.native_us / p.native_us for m, p in both if m.native_us and p.native_us]
                ratios = [(m.ratio, p.ratio) for m, p in both if m.ratio and p.ratio]
                if times:
                    yield (
                        f"- {ranks} GPUs, {_words(low, high)}: measured ÷ {name} "
                        f"{geometric_mean(times):.2f} ({len(times)} points); of FlashInfer "
                        f"{_number(geometric_mean([m for m, _ in ratios]), 2)}, {name} "
                        f"{_number(geometric_mean([p for _, p in ratios]), 2)}"
                    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _words(low: int, high: int) -> str:
    if not low:
        return f"up to {format_size(high)}"
    return f"above {format_size(low - 1)}" + (f" up to {format_size(high)}" * (high < 2**40))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("virtual", type=Path, help="what virtual_node.py wrote")
    parser.add_argument("real", type=Path, nargs="*", help="profiles, native_kernels.py's JSON")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[2048, 4096, 7168])
    parser.add_argument("--kib", type=float, nargs="+", default=KIB_SHOWN)
    asked = parser.parse_args()
    document = json.loads(asked.virtual.read_text())
    virtual, gpu = virtual_times(document), document["node"]["gpu"]
    for file in asked.real or [None]:
        real = json.loads(file.read_text()) if file else None
        rows = compared(virtual, measured_times(real) if real else {})
        node = f"; measured ({file.name}): {real['fingerprint']['device']}" if real else ""
        print(f"\nvirtual: one {gpu}{node}\n")
        print("\n".join([*table(shown(rows, asked.hidden_sizes, asked.kib)), "", *means(rows)]))


if __name__ == "__main__":
    main()
