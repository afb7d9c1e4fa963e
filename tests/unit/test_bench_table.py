"""The table of `fusewise bench`: nccl-tests' columns, header and units."""

from __future__ import annotations

import json

import pytest

from fusewise.node import Fingerprint
from fusewise.profiles.schema import (
    Sample,
)
from fusewise.report.bench_table import bench, bench_record, bus_factor, header
from fusewise.report.text import render_sections
from fusewise.shape import Shape
from fusewise.tune.settings import Settings
from tests.samples import sample

FUSED, UNFUSED = "native.one_shot", "nccl + rms_norm"


def test_bench_has_the_columns_of_nccl_tests_and_its_header():
    settings = Settings("bfloat16", (2048,), 4096, 2**20, 1.0)
    node = Fingerprint(device_type="cuda", device="X", world_size=2, fabric="nv18")
    samples = [sample(UNFUSED, 64, 8.0), sample(FUSED, 64, 4.0),
               sample("nccl", 64, 7.0, op="all_reduce")]  # fmt: skip
    wrong = {("all_reduce_rms_norm", FUSED, 16, 2048): 0}
    sections = bench(samples, "bfloat16", 2, wrong, header(settings, node))
    text = render_sections(sections, "table", terminal=False).splitlines()
    assert text[0].startswith("# nRanks 2 minBytes 4096 maxBytes 1048576 step: 2(factor)")
    assert text[2:4] == ["# Using devices", "#  Ranks 0-1 on 1 node(s), nv18: X"]
    assert text[5] == "# all_reduce_rms_norm"
    assert text[6].split() == ["size", "count", "time", "spread", "algbw", "busbw"]
    assert text[7].split() == [
        "hidden", "tokens", "(B)", "(elements)", "type", "path", "(us)", "(±)", "(GB/s)", "(GB/s)",
        "#wrong",
    ]  # fmt: skip
    first, second = text[8:10]
    assert first.split()[:2] == ["2048", "16"]
    assert first.split()[-5:] == ["4.00", "0.0%", "16.38", "16.38", "0"]
    assert second.split()[-4:] == ["8.00", "0.0%", "8.19", "8.19"]  # not checked: no number
    rows = json.loads(render_sections(sections, "json"))["bench"]["rows"]
    assert [row["op"] for row in rows] == ["all_reduce_rms_norm"] * 2 + ["all_reduce"]


@pytest.mark.parametrize(("world_size", "factor"), [(1, 0.0), (2, 1.0), (4, 1.5), (8, 1.75)])
def test_bus_factor(world_size, factor):
    assert bus_factor(world_size) == factor


def test_bandwidth_is_in_units_of_1e9_bytes_per_second():
    shape = Shape(1000, 500, "float32")
    one = Sample(op="all_reduce", path="nccl", num_tokens=1000, hidden_size=500,
                 times_us=(990.0, 1000.0, 1010.0))  # fmt: skip
    row = bench_record(shape, one, 4, None)
    assert (row["size_bytes"], row["count"]) == (2_000_000, 500_000)
    assert row["algbw_gb_per_s"] == pytest.approx(2.0)
    assert row["busbw_gb_per_s"] == pytest.approx(3.0)
    assert (row["time_low_us"], row["time_high_us"]) == (990.0, 1010.0)
    assert row["spread"] == pytest.approx(0.01)
