"""A profile to draw, and what its picture says. For the tests of pictures and pages."""

from __future__ import annotations

from xml.etree import ElementTree

from fusewise.node import Fingerprint
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import PathRecord, Profile, Provenance, Sample
from fusewise.report import colors, drawing, plot
from fusewise.report.drawing import Area

FUSED, UNFUSED = "flashinfer.one_shot", "nccl + rms_norm"
SVG = "{http://www.w3.org/2000/svg}"
EVIL = '<script>alert("x")</script> $a$ & \x1b[31m'


def profile(hidden_sizes=(2048,), device="NVIDIA H200", tokens=(16, 64, 256, 1024), **changes):
    """The fused path gains below and loses above 128 tokens, three rounds each."""
    samples = [
        Sample(path=path, num_tokens=t, hidden_size=h, times_us=(us, us * 1.01, us * 0.99))
        for h in hidden_sizes
        for t in tokens
        for path, us in ((FUSED, 4 + t / 16), (UNFUSED, 8 + t / 32))
    ]
    fields = {
        "provenance": Provenance(
            origin="measured", source="a test", created="2026-01-02", fusewise="0.1.0"
        ),
        "fingerprint": Fingerprint(device_type="cuda", device=device, world_size=2, fabric="nv18"),
        "dtype": "bfloat16",
        "baseline": UNFUSED,
        "paths": (
            PathRecord(name=FUSED, provider="flashinfer", fused=True),
            PathRecord(name=UNFUSED, provider="torch", fused=False),
        ),
        "samples": tuple(samples),
    }
    return Profile(**(fields | changes))


def written_svg(here, plan=None):
    return drawing.svg(plot.picture(here, plan or derive(here)), colors.literal, "a title", "paper")


def labels(svg):
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]


def strip_of(sheet, *names):
    """The pieces of the strip, left to right, as (name of the colour, left, right)."""
    wanted = {colors.color_of(name) for name in names}
    boxes = [
        (item.color, item.points[0][0], item.points[1][0])
        for item in sheet.items
        if isinstance(item, Area) and item.opacity == 1 and item.color in wanted
        and len(item.points) == 4 and item.points[2][1] - item.points[0][1] == 18
    ]  # fmt: skip
    return sorted(boxes, key=lambda box: box[1])
