"""Pictures and pages: the same bytes for the same profile, every label there, nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fusewise.errors import InputError
from fusewise.node import Fingerprint
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Exclusion, PathRecord, Profile, Provenance, Sample
from fusewise.report import html, plot
from fusewise.report.panel import STYLES, ratio_top

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


def labels(svg):
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def drawn():
    here = profile((2048, 4096))
    return here, plot.picture(here, derive(here), "svg")


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
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": False}):
        assert plot.picture(again, derive(again), "svg") == svg
        assert mpl.rcParams["font.size"] == 30
    assert b"dc:date" not in svg
    assert b"Matplotlib v" not in svg


def test_the_strip_shows_the_plan_it_was_given_not_one_of_its_own(drawn):
    here, svg = drawn
    never = plot.picture(here, derive(here, min_gain=5.0), "svg")
    assert not [text for text in labels(never) if "crossover" in text]
    assert never != svg


def test_where_measuring_starts_is_no_crossover():
    """Below the smallest size the same path runs, and only claims less."""
    here = profile(tokens=(64, 256))
    assert derive(here).tables[0].bands[0].origin == "extrapolated"
    svg = plot.picture(here, derive(here), "svg")
    assert sum("crossover" in text for text in labels(svg)) == 1


def test_files_by_suffix(tmp_path):
    here = profile(tokens=(64, 256))
    plan = derive(here)
    for name, start in (("a.svg", b"<?xml"), ("b.PNG", b"\x89PNG")):
        plot.save(here, plan, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match=r"expected \.svg or \.png"):
        plot.save(here, plan, tmp_path / "d.pdf")
    assert not (tmp_path / "d.pdf").exists()


def test_one_size_and_one_path_still_make_a_picture():
    only = Sample(path=UNFUSED, num_tokens=64, hidden_size=2048, times_us=(8.0,))
    here = profile(samples=(only,))
    assert "256K" in labels(plot.picture(here, derive(here), "svg"))


def test_four_hidden_sizes_wrap_into_two_rows():
    here = profile((1024, 2048, 4096, 8192), tokens=(64, 256))
    figure = plot.figure(here, derive(here))
    assert len(figure.axes) == 8
    width, height = figure.get_size_inches()
    assert width < 12
    assert height > 9


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
        plot.picture(here, derive(here), "svg")


def test_no_two_backends_of_one_node_look_alike():
    cpu = {"shm.one_shot", "gloo"}
    for group in (cpu, set(STYLES) - cpu):
        looks = [STYLES[name] for name in group]
        assert len(set(looks)) == len(looks)


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed out of turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


@pytest.fixture(scope="module")
def written():
    here = profile(excluded=(Exclusion(backend="multimem", reason="no multicast here"),))
    return html.page(here, derive(here))


def test_the_page_stands_alone_and_holds_every_part(written):
    page = Page(written)
    assert page.tags.count("svg") == 1
    assert page.tags.count("table") == 6
    for word in ("Decision: all_reduce_rms_norm", "Not measured", "no multicast here", "world_size",
                 "engine default", "crossover 406K"):  # fmt: skip
        assert word in page.words
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert "metadata" not in page.tags


def test_the_page_escapes_what_a_profile_says():
    here = profile(device=EVIL, excluded=(Exclusion(backend=EVIL, reason=EVIL),))
    text = html.page(here, derive(here))
    page = Page(text)
    assert "script" not in page.tags
    assert "\x1b" not in text
    visible = EVIL.replace("\x1b", "\\x1b")
    assert page.words.count(visible) == 3  # the device, the path and the reason
    assert re.search(r"<title>fusewise: &lt;script&gt;", text)


def test_the_decision_comes_first_and_the_chosen_cell_is_marked(written):
    heads = re.findall(r'<h2 id="([\w-]+)">', written)
    assert len(set(heads)) == len(heads)
    assert heads[:2] == ["decision-all-reduce-rms-norm", "crossovers-all-reduce-rms-norm"]
    assert heads[-1] == "node-and-provenance"
    assert written.count('class="right chosen"') == 4
    assert '<td class="right chosen">*5.00</td>' in written
    assert '<td class="do-not-fuse">do not fuse</td>' in written
