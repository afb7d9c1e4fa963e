"""The benchmark's verdicts from made-up times."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.native_summary import (
    KIB,
    MIB,
    against_flashinfer,
    summary,
    worst_of_best,
    worst_of_fp8,
    worst_of_links,
)


def row(path: str, message_bytes: int, time_us: float, op: str = "all_reduce_rms_norm") -> Any:
    return {
        "op": op, "path": path, "num_tokens": 1, "hidden_size": 2048,
        "message_bytes": message_bytes, "time_us": time_us,
    }  # fmt: skip


def test_the_geometric_mean_is_over_the_band_only() -> None:
    rows = [
        row("flashinfer.one_shot", 4 * KIB, 10), row("native.one_shot", 4 * KIB, 4),
        row("flashinfer.one_shot", 64 * KIB, 10), row("native.one_shot", 64 * KIB, 9),
        row("flashinfer.one_shot", 128 * KIB, 10), row("native.one_shot", 128 * KIB, 5),
    ]  # fmt: skip
    small, middle, large = against_flashinfer(rows)
    assert small[2] == pytest.approx(0.6)
    assert middle[2] == pytest.approx(0.5)
    assert math.isnan(large[2])


def test_the_worst_size_and_its_peer_are_named() -> None:
    rows = [
        row("native.one_shot", MIB, 8), row("nccl + rms_norm", MIB, 10), row("custom", MIB, 7.5),
        row("native.two_shot", 2 * MIB, 9), row("native.one_shot", 2 * MIB, 30),
        row("nccl + rms_norm", 2 * MIB, 10),
    ]  # fmt: skip
    worst, where = worst_of_best(rows, "all_reduce_rms_norm")
    assert worst == pytest.approx(8 / 7.5)
    assert where == f"{MIB} bytes, hidden 2048, against custom"
    assert worst_of_best(rows, "all_reduce") == (0.0, "no peer")


def test_links_are_asked_for_from_8_mib_on() -> None:
    rows = [row("native.one_shot", 4 * MIB, 1e6), row("native.one_shot", 8 * MIB, 30)]
    worst, _ = worst_of_links(rows, 333.0)
    assert worst == pytest.approx(30 / (8 * MIB / 333e3))


def test_fp8_is_compared_with_the_same_strategy() -> None:
    rows = [row("native.one_shot", MIB, 10), row("native.one_shot+fp8_token", MIB, 10.6)]
    worst, where = worst_of_fp8(rows)
    assert worst == pytest.approx(1.06) and where.startswith("native.one_shot+fp8_token")


def test_the_table_says_what_was_missed_and_what_was_not_measured() -> None:
    rows = [row("native.one_shot", 8 * MIB, 26), row("flashinfer.one_shot", 8 * MIB, 52)]
    lines = summary(rows, 333.0, 12.5)
    assert [next(w for w in ("not measured", "ok", "MISSED") if w in line) for line in lines] == [
        "not measured", "not measured", "ok", "ok", "not measured", "ok", "not measured", "MISSED",
    ]  # fmt: skip
