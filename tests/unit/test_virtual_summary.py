"""What a run of the virtual node is held against."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from virtual_summary import tables, targets


def row(arm: str, num_tokens: int, time_us: float, ratio: float, **other: Any) -> dict[str, Any]:
    return {
        "pattern": "chain", "world_size": 2, "hidden_size": 2048, "num_tokens": num_tokens,
        "message_bytes": 4096 * num_tokens, "arm": arm, "time_us": time_us, "ratio": ratio, **other,
    }  # fmt: skip


def line(rows: list[dict[str, Any]], start: str) -> str:
    (found,) = [one for one in targets(rows) if one.startswith(start)]
    return found


@pytest.mark.parametrize(("ratio", "verdict"), [(0.58, "yes"), (0.59, "NO")])
def test_a_range_of_sizes_is_judged_by_its_geometric_mean(ratio: float, verdict: str) -> None:
    rows = [
        row("native.one_shot", 1, 1.0, 9.0),  # 4 KiB: below the range
        row("native.one_shot", 2, 1.0, ratio * 2),
        row("native.one_shot", 16, 1.0, ratio / 2),
        row("native.one_shot", 8, 1.0, 9.0, hidden_size=2880),  # not of the mean
        row("native.one_shot:early", 4, 1.0, 9.0),
    ]
    assert line(rows, "chain, 2 ranks, 8-64 KiB").endswith(verdict)
    assert line(rows, "chain, 2 ranks, 128-1024 KiB").endswith("not measured")


def test_single_points_the_floor_and_the_second_trip() -> None:
    shipped = "native.one_shot"
    rows = [
        row(shipped, 2, 2.2, 0.7),
        row(shipped, 64, 4.0, 0.76),
        row("native.one_shot:early", 2, 1.9, 0.6),  # each of the floor that triggers like it
        row("flashinfer.one_shot:early", 64, 3.9, 1.0),
        row("exchange", 2, 1.5, 0.5),
        row("exchange:late", 2, 1.6, 0.6),
        row(shipped, 2, 3.0, 0.6, world_size=4),
        row("native.two_shot", 2, 4.1, 0.8, world_size=4),
    ]
    assert line(rows, "chain, 2 ranks, worst point").endswith("0.76 (≤ 0.75) NO")
    assert line(rows, "chain, 2 ranks, worst of FlashInfer's").endswith("1.03 (≤ 1.00) NO")
    early = line(rows, "chain, 2 ranks, 2 x 2048, native.one_shot:early of exchange, 1.50 µs")
    assert early.endswith("1.27 (≤ 1.30) yes")
    late = line(rows, "chain, 2 ranks, 2 x 2048, native.one_shot of exchange:late, 1.60 µs")
    assert late.endswith("1.38 (≤ 1.30) NO")
    assert line(rows, "chain, 4 ranks, two-shot over one-shot").endswith("1.10 (≤ 1.20) yes")


def test_the_table_has_a_line_per_arm_and_a_column_per_point() -> None:
    lines = list(tables([row("a", 2, 1.5, 0.5), row("a", 64, 2.5, 0.8), row("b", 2, 3.0, 1.0)]))
    assert lines[1].split() == ["2048x2", "2048x64", "≤64K", ">64K", "max"]
    assert lines[2].split() == ["a", "1.50", "2.50", "0.50", "0.80", "0.80"]
    assert lines[3].split() == ["b", "3.00", "1.00", "nan", "1.00"]
