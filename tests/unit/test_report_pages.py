"""Pages: every part there, every mark explained, nothing unescaped."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fusewise.engines.cap import ExplicitCap
from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Exclusion
from fusewise.report import advice, html, plot
from tests.drawings import EVIL, FUSED, UNFUSED, labels, profile, strip_of, written_svg


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
    assert page.tags.count("figure") == 1
    assert page.tags.count("table") == 6
    for word in ("What to do next", "Decision: all_reduce_rms_norm", "Not measured",
                 "no multicast here",
                 "world_size", "engine default", "crossover 406K"):  # fmt: skip
        assert word in page.words
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "xlink:href", "data")]
    assert loaded == []
    assert "url(" not in written
    assert "@import" not in written


def test_every_mark_and_every_path_is_in_the_legend(written):
    legend = written[written.index('<ul class="legend">') : written.index('<h2 id="bands">')]
    assert legend.count("<svg") == legend.count("<li>") == 2 + 9
    for word in (FUSED, UNFUSED, "solid", "dashed", "broad shade", "interval", "bar", "crossover",
                 "grey column", "chosen there"):  # fmt: skip
        assert word in legend
    assert f"<b>{FUSED}</b> up to 406K; <b>{UNFUSED}</b> up to 4M" in written


def test_neighbouring_bands_of_one_path_are_one_winner_and_no_crossover():
    here = profile()
    plan = derive(here)
    (table,) = plan.tables
    first, *rest = [band for band in table.bands if band.end_bytes != table.validated_from]
    start = table.validated_from  # below it nobody measured
    split = (replace(first, min_bytes=0, end_bytes=start), replace(first, min_bytes=start), *rest)
    cut = replace(plan, tables=(replace(table, bands=split),))
    assert f"<b>{FUSED}</b> up to 406K; <b>{UNFUSED}</b> up to 4M" in html.page(here, cut)
    assert sum("crossover" in text for text in labels(written_svg(here, cut))) == 1
    (sheet,) = plot.panels(here, cut, 470).values()
    assert len(strip_of(sheet, FUSED, UNFUSED)) == 2


def test_both_schemes_define_every_colour_that_the_page_uses(written):
    used = set(re.findall(r"var\(--([\w-]+)\)", written))
    assert used >= {"ink", "paper", "path-nccl", "path-flashinfer-one_shot"}
    light, dark = re.findall(r":root \{ (?:color-scheme: light dark; )?(.*?)\}", written)
    for shades in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", shades))
    assert light != dark


def test_the_page_says_what_to_do_about_an_engine():
    seed = store.load("nvidia-h200-tp8")
    vllm = advice.engine_named("vllm")
    for version, lowered in (("0.22", True), ("0.33", False)):
        settings = vllm.settings(version, seed.fingerprint, seed.dtype, {}, {})
        told = advice.of_engine("vllm", seed, settings, "flag")
        text = html.page(seed, derive(seed), advice=[told])
        words = " ".join(Page(text).words)
        assert f"vllm {version}" in words
        assert ("(262144 bytes)" in words) == lowered
        assert ('{"pass_config": {"fi_allreduce_fusion_max_size_mb": 0.25}}' in words) == lowered
        assert ("256K–512K at hidden 2048: up to 4.30 µs per call" in words) == lowered
        assert ("was not measured here" in words) != lowered
    links = [value for name, value in Page(text).attributes if name == "href"]
    assert "https://github.com/vllm-project/vllm/issues/44079" in links
    assert [link for link in links if link.startswith(html.REPOSITORY)]


def test_a_cap_somebody_set_is_shown_even_where_it_cures_nothing():
    seed = store.load("nvidia-h200-tp8")
    vllm = advice.engine_named("vllm")
    settings = vllm.settings("0.22", seed.fingerprint, seed.dtype, {}, {})
    told = advice.of_engine("vllm", seed, settings, "flag", ExplicitCap(2**20, "flag"))
    words = " ".join(Page(html.page(seed, derive(seed), advice=[told])).words)
    assert "(1048576 bytes)" in words
    assert "256K–512K" in words


def test_without_advice_the_page_gives_that_of_every_engine():
    old = store.load("nvidia-h200-tp2")
    text = html.page(old, derive(old))
    assert text.count("<section class=card>") == len(advice.names())
    assert "(4575232 bytes)" in text


def test_an_engine_that_cannot_run_there_is_said_and_cpu_ranks_have_none(written):
    old = store.load("nvidia-h200-tp2")
    mark = old.fingerprint.model_copy(update={"sm": 70})
    told = advice.of_all_engines(old.model_copy(update={"fingerprint": mark}))
    assert all(one.headline for one in told)
    assert not any(one.lowered for one in told)
    cpu = profile().fingerprint.model_copy(update={"device_type": "cpu", "sm": None})
    here = profile(fingerprint=cpu)
    assert advice.of_all_engines(here) == []
    assert "These are CPU ranks" in html.page(here, derive(here))
    assert "These are CPU ranks" not in written


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
    assert heads[:4] == ["next", "times", "bands", "crossovers"]
    assert heads[-1] == "profile"
    assert written.count('class="right chosen"') == 4
    assert '<td class="right chosen">*5.00</td>' in written
    assert '<td class="do-not-fuse">do not fuse</td>' in written
