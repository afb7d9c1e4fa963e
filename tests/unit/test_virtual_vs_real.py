"""Predictions beside measurements: whose times count, what is interpolated, what is printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from virtual_vs_real import (
    UNKNOWN,
    Pair,
    Point,
    Row,
    compared,
    means,
    measured_times,
    model,
    pair_of,
    shown,
    table,
    virtual_at,
    virtual_times,
)

KIB = 1024


def arm(name: str, size: int, time_us: float, pattern: str = "chain") -> dict[str, Any]:
    return {
        "pattern": pattern, "world_size": 2, "hidden_size": 2048, "message_bytes": size,
        "arm": name, "time_us": time_us,
    }  # fmt: skip


def profile(times_us: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    samples = [
        {"op": "all_reduce_rms_norm", "path": path, "num_tokens": 2, "hidden_size": 2048,
         "times_us": times}
        for path, times in times_us.items()
    ]  # fmt: skip
    samples.append({**samples[0], "op": "all_reduce", "times_us": (0.1,)})
    return {"fingerprint": {"world_size": 2}, "dtype": "bfloat16", "samples": samples}


def test_the_fastest_that_a_plan_can_name_counts_on_either_side() -> None:
    times = {
        "native.one_shot": 3.0, "native.one_shot:v2": 2.5, "native.two_shot": 4.0,
        "native.one_shot:early": 1.0, "native.one_shot.early_trigger": 1.0,
        "native.one_shot+fp8_token": 1.0, "nccl + rms_norm": 0.5,
        "flashinfer.one_shot": 5.0, "flashinfer.two_shot": 6.0, "flashinfer.one_shot:early": 1.0,
    }  # fmt: skip
    assert pair_of(times) == Pair(2.5, 5.0)
    assert pair_of(times).ratio == 0.5
    assert pair_of({"nccl + rms_norm": 1.0}) == UNKNOWN
    assert Pair(1.0, None).ratio is None


def test_a_profile_and_the_kernels_own_run_are_read_alike() -> None:
    point = Point(2, 2048, 8 * KIB)
    times = {"native.one_shot:v2": (3.0, 2.0, 9.0), "flashinfer.one_shot": (6.0, 6.0, 5.0)}
    assert measured_times(profile(times)) == {point: Pair(3.0, 6.0)}
    row = {"op": "all_reduce_rms_norm", "path": "native.one_shot", "num_tokens": 2,
           "hidden_size": 2048, "message_bytes": 8 * KIB, "times_us": [3.0, 2.0, 9.0]}  # fmt: skip
    rows = [row, {**row, "op": "all_reduce", "times_us": [0.1]}]
    run = {"fingerprint": {"world_size": 2}, "rows": rows}
    assert measured_times(run) == {point: Pair(3.0, None)}


def test_the_virtual_node_is_interpolated_and_never_beyond_its_sizes() -> None:
    document = {
        "rows": [
            arm("native.one_shot", 4 * KIB, 1.0), arm("flashinfer.one_shot", 4 * KIB, 2.0),
            arm("native.one_shot", 8 * KIB, 2.0), arm("native.one_shot", 8 * KIB, 0.1, "in_place"),
        ]
    }  # fmt: skip
    times = virtual_times(document)
    assert virtual_at(times, Point(2, 2048, 4 * KIB)) == Pair(1.0, 2.0)
    assert virtual_at(times, Point(2, 2048, 6 * KIB)) == Pair(1.5, None)
    assert virtual_at(times, Point(2, 2048, 8 * KIB)) == Pair(2.0, None)
    beyond = [Point(2, 2048, 4 * KIB - 16), Point(2, 2048, 8 * KIB + 16)]
    others = [Point(4, 2048, 4 * KIB), Point(2, 4096, 4 * KIB)]
    assert {virtual_at(times, point) for point in beyond + others} == {UNKNOWN}


@pytest.mark.parametrize(
    ("ranks", "size", "native_us"),
    # both sides of where two-shot takes over
    [
        (2, 2**26, 189.7),
        (4, 64 * KIB, 3.1),
        (4, 256 * KIB, 4.4),
        (8, 4 * KIB, 3.3),
        (8, 64 * KIB, 4.2),
        (8, 2**23, 44.9),
    ],
)
def test_the_model_is_the_one_of_the_docs(ranks: int, size: int, native_us: float) -> None:
    assert model(Point(ranks, 2048, size)).native_us == pytest.approx(native_us, abs=0.06)


def test_the_model_of_flashinfer_fits_the_reports_points() -> None:
    reported = {196608: 10.4, 262144: 12.1, 393216: 15.0, 524288: 17.9}
    found = {size: model(Point(8, 2048, size)).flashinfer_us for size in reported}
    assert found == pytest.approx(reported, abs=0.25)


def test_what_is_measured_gives_the_rows_else_what_the_virtual_node_has() -> None:
    here, there = Point(2, 2048, 4 * KIB), Point(8, 2048, 4 * KIB)
    virtual = {here: Pair(1.0, 2.0), there: Pair(3.0, 4.0)}
    (row,) = compared(virtual, {here: Pair(1.5, 2.5)})
    assert (row.point, row.virtual, row.measured) == (here, Pair(1.0, 2.0), Pair(1.5, 2.5))
    assert [(r.point, r.measured) for r in compared(virtual, {})] == [
        (here, UNKNOWN),
        (there, UNKNOWN),
    ]


def test_a_table_shows_the_rows_next_to_the_sizes_asked_for() -> None:
    sizes = (56 * KIB, 55 * KIB, 63 * KIB, 128 * KIB)
    points = [Point(2, 7168, size) for size in sizes]
    rows = [Row(p, Pair(2.0, 4.0), Pair(2.0, 5.0), Pair(3.0, 4.0)) for p in points]
    assert [r.point.message_bytes for r in shown(rows, [7168], [64])] == [63 * KIB]
    assert [r.point.message_bytes for r in shown(rows[:2], [7168], [64])] == [56 * KIB]
    assert shown(rows[1:2], [7168], [64]) == []  # farther than an eighth
    assert shown(rows, [2048], [64]) == []
    lines = list(table([*rows[:1], Row(points[3], UNKNOWN, Pair(2.04, None), UNKNOWN)]))
    assert lines[2] == "| 2 | 7168 | 56K | 2.0 | 2.0 | 3.0 | 0.50 | 0.40 | 0.75 |"
    assert lines[3] == "| 2 | 7168 | 128K | – | 2.0 | – | – | – | – |"
    assert {line.count("|") for line in lines} == {10}


def test_means_say_how_far_each_prediction_was_off() -> None:
    at = [Point(2, 2048, size) for size in (4 * KIB, 64 * KIB, 64 * KIB + 16)]
    rows = [
        Row(at[0], Pair(1.0, 2.0), Pair(2.0, 8.0), Pair(2.0, 4.0)),
        Row(at[1], Pair(1.0, 8.0), Pair(2.0, 8.0), Pair(8.0, 4.0)),
        Row(at[2], UNKNOWN, Pair(2.0, None), Pair(3.0, 4.0)),
    ]
    assert list(means(rows)) == [
        "- 2 GPUs, up to 64K: measured ÷ virtual 4.00 (2 points); of FlashInfer 1.00, virtual 0.25",
        "- 2 GPUs, up to 64K: measured ÷ model 2.00 (2 points); of FlashInfer 1.00, model 0.25",
        "- 2 GPUs, above 64K up to 1M: measured ÷ model 1.50 (1 points); of FlashInfer –, model –",
    ]
