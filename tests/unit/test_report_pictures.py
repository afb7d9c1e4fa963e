"""Pictures: the same bytes for the same profile, every label there, nothing off the sheet."""

from __future__ import annotations

import sys

import pytest

from fusewise.decode import picture as decode_picture
from fusewise.errors import InputError, UnavailableError
from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile, Sample
from fusewise.report import colors, drawing, html, plot
from fusewise.report.drawing import Area, Line, Words
from fusewise.report.panel import _below
from fusewise.report.scales import ratio_top
from tests.drawings import FUSED, UNFUSED, labels, profile, strip_of, written_svg


@pytest.fixture(scope="module")
def drawn():
    here = profile((2048, 4096))
    return here, written_svg(here)


def test_the_picture_names_paths_panels_axes_and_the_crossover(drawn):
    _, svg = drawn
    texts = labels(svg)
    for text in (FUSED, UNFUSED, "hidden 2048", "hidden 4096", "time per call, µs",
                 "time ÷ fastest", "message size", "64K", "4M"):  # fmt: skip
        assert text in texts
    # Between 64 tokens (ahead by 2 µs) and 256 (behind by 4): 64 · 4 ** (1 / 3) rows.
    assert "crossover 406K" in texts
    assert "crossover 813K" in texts
    assert "all_reduce → + residual → RMSNorm on NVIDIA H200, 2 ranks, nv18, bfloat16" in texts


def test_equal_profiles_give_equal_bytes_whatever_the_users_matplotlibrc(drawn):
    import matplotlib as mpl

    here, svg = drawn
    again = Profile.model_validate(here.model_dump())
    assert written_svg(again) == svg
    sheet = plot.picture(here, derive(here))
    first = drawing.png(sheet, colors.literal, "paper")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": False}):
        assert drawing.png(sheet, colors.literal, "paper") == first
        assert mpl.rcParams["font.size"] == 30
    assert b"Matplotlib" not in first


def test_the_strip_shows_the_plan_it_was_given_not_one_of_its_own(drawn):
    here, svg = drawn
    never = written_svg(here, derive(here, min_gain=5.0))
    assert not [text for text in labels(never) if "crossover" in text]
    assert never != svg


def test_the_strip_is_painted_over_measured_sizes_only():
    both = profile((2048, 4096))
    tokens = {2048: (16, 64, 256, 1024), 4096: (64, 256)}
    kept = tuple(s for s in both.samples if s.num_tokens in tokens[s.hidden_size])
    here = profile(samples=kept)
    sheets = plot.panels(here, derive(here), 470)
    strips = {hidden: strip_of(sheet, FUSED, UNFUSED) for hidden, sheet in sheets.items()}
    marks = {
        hidden: sorted(
            sum(x for x, _ in item.points) / len(item.points)
            for item in sheet.items if isinstance(item, Area) and item.opacity == 1
            and len(item.points) in (12, 3)
        )
        for hidden, sheet in sheets.items()
    }  # fmt: skip
    for hidden, strip in strips.items():
        assert [color for color, _, _ in strip] == [
            colors.color_of(FUSED),
            colors.color_of(UNFUSED),
        ]
        assert strip[0][1] == pytest.approx(marks[hidden][0], abs=0.01)
        assert strip[-1][2] == pytest.approx(marks[hidden][-1], abs=0.5)
        assert strip[0][2] == pytest.approx(strip[1][1], abs=0.01)
    # Both panels have one scale: 16 tokens of 2048 are a quarter of 64 tokens of 4096 and more.
    assert strips[4096][0][1] > strips[2048][0][1]
    assert strips[4096][-1][2] < strips[2048][-1][2]


def test_every_band_of_the_strip_is_named_inside_or_above_it():
    seed = store.load("nvidia-h200-tp8")
    (sheet,) = plot.panels(seed, derive(seed), 470).values()
    said = [item.text for item in sheet.items if isinstance(item, Words)]
    for name in ("flashinfer.one_shot", "multimem + rms_norm"):
        assert name in said


def test_lines_stop_at_the_edge_and_nothing_leaves_the_sheet():
    assert _below([(0, 5), (10, 15)], 10) == [[(5.0, 10), (10, 15)]]
    assert _below([(0, 15), (10, 5), (20, 15)], 10) == [
        [(0, 15), (5.0, 10)],
        [(15.0, 10), (20, 15)],
    ]
    assert _below([(0, 5), (10, 5)], 10) == []
    here = store.load("nvidia-h200-tp2")  # paths ten times as slow as the best are in it
    sheet = plot.picture(here, derive(here))
    for item in sheet.items:
        for x, y in [item.at] if isinstance(item, Words) else item.points:
            assert 0 <= x <= sheet.width
            assert 0 <= y <= sheet.height
    lines = [i for i in sheet.items if isinstance(i, Line) and i.width == 1.4]
    assert len({point for line in lines for point in line.points}) > 50


def test_wild_intervals_and_a_slow_path_that_runs_stay_in_their_part():
    wild = [
        Sample(path=path, num_tokens=t, hidden_size=2048, times_us=times)
        for t in (16, 64)
        for path, times in ((FUSED, (0.1, 5.0, 500.0)), (UNFUSED, (40.0, 50.0, 90.0)))
    ]
    here = profile(samples=tuple(wild))
    (sheet,) = plot.panels(here, derive(here, min_gain=50.0), 470).values()
    drawn = [item for item in sheet.items if not isinstance(item, Words) and item.color != "soft"]
    for item in drawn:
        for _, y in item.points:
            assert 38 - 4 <= y <= 238 or 268 <= y <= 286 or 308 - 4 <= y <= 400 + 4


def test_files_by_suffix(tmp_path):
    here = profile(tokens=(64, 256))
    plan = derive(here)
    for name, start in (("a.svg", b"<svg"), ("b.PNG", b"\x89PNG")):
        plot.save(here, plan, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match=r"expected \.svg or \.png"):
        plot.save(here, plan, tmp_path / "d.pdf")
    assert not (tmp_path / "d.pdf").exists()


def test_without_matplotlib_a_png_names_the_extra_and_an_svg_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    here = profile(tokens=(64, 256))
    plot.save(here, derive(here), tmp_path / "a.svg")
    assert html.page(here, derive(here))
    with pytest.raises(UnavailableError, match=r"pip install 'fusewise\[plot\]'"):
        plot.save(here, derive(here), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_one_size_and_one_path_still_make_a_picture():
    only = Sample(path=UNFUSED, num_tokens=64, hidden_size=2048, times_us=(8.0,))
    here = profile(samples=(only,))
    assert "256K" in labels(written_svg(here))


def test_four_hidden_sizes_wrap_into_two_rows():
    here = profile((1024, 2048, 4096, 8192), tokens=(64, 256))
    three, four = (
        plot.picture(profile((1024, 2048, 4096), tokens=(64, 256)), derive(here)),
        (plot.picture(here, derive(here))),
    )
    assert four.width == three.width
    assert four.height > 1.7 * three.height


@pytest.mark.parametrize(
    ("ratios", "top"),
    [
        ([[[1, 1.2, 5]]], 2.0),  # the slow ones leave the picture
        ([[[1, 5, 9]]], 6.0),  # nobody is near: the runner-up stays in it
        ([[[1, 5, 9]], [[1, 1.2]]], 2.0),  # somewhere somebody is near
        ([[[1, 1.2]]], 1.23),  # all are near
        ([[[1, 1.01]]], 1.1),
        ([[[1]]], 1.1),
    ],
)
def test_the_ratio_axis_shows_the_race(ratios, top):
    assert ratio_top(ratios) == pytest.approx(top)


def test_nothing_to_draw_is_refused():
    bare = Sample(op="all_reduce", path="nccl", num_tokens=64, hidden_size=2048, times_us=(8.0,))
    here = profile(samples=(bare,))
    with pytest.raises(InputError, match="nothing to draw"):
        plot.picture(here, derive(here))


def test_no_two_backends_of_one_node_look_alike():
    cpu = {"shm.one_shot", "gloo"}
    for group in (cpu, set(colors.STYLES) - cpu):
        for ground in (0, 1):
            looks = [(colors.STYLES[name][ground], colors.STYLES[name][2]) for name in group]
            assert len(set(looks)) == len(looks)


def contrast(one, other):
    """WCAG 2's contrast ratio of two colours."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_words_can_be_read_on_either_ground(dark):
    for words in ("ink", "soft", "accent", "good", "bad"):
        for ground in ("paper", "raised"):
            assert contrast(colors.literal(words, dark), colors.literal(ground, dark)) > 4.5
    assert contrast(colors.literal("ink", dark), colors.literal("good-ground", dark)) > 4.5
    for name in colors.names():
        if name.startswith("path-"):
            on = colors.literal(colors.on(name), dark)
            assert contrast(colors.literal(name, dark), on) > 4.5, name
            assert (
                not dark or contrast(colors.literal(name, dark), colors.literal("paper", dark)) > 4
            )


def test_the_picture_of_a_decode_run_names_every_arm_and_stays_on_its_sheet(tmp_path):
    rows = [
        {"phase": phase, "arm": arm, "tokens": tokens, "path": "p", "graph": "g",
         "tokens_per_run": 8, "message_bytes": 4096 * tokens,
         "times_s": [base, base * 1.05, base * 0.95]}
        for phase in ("decode", "prefill") for tokens in (1, 8, 64)
        for arm, base in (("unfused", 1.0), ("engine_cap", 0.9), ("measured", 0.7))
    ]  # fmt: skip
    sheet = decode_picture.picture(rows, "a run")
    svg = drawing.svg(sheet, colors.literal, "a run", "paper")
    for text in ("unfused", "engine_cap", "measured", "decode, by batch size", "64"):
        assert text in labels(svg)
    for item in sheet.items:
        for x, y in [item.at] if isinstance(item, Words) else item.points:
            assert 0 <= x <= sheet.width
            assert 0 <= y <= sheet.height
    dots = {item.color for item in sheet.items if isinstance(item, Area)}
    assert len(dots) == 3
    decode_picture.save(rows, "a run", tmp_path / "run.svg")
    assert (tmp_path / "run.svg").read_text("utf-8") == svg
