"""The page in a real browser: nothing leaves the window, nothing is said on the console."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.report import colors
from fusewise.report.advice import of_all_engines
from fusewise.report.html import page
from tests.browser import CHROMIUM, Browser, Scheme, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium")

# Elements of a page that stick out of the window, unless a box around them scrolls or they are
# drawn by such a box's own width; each with its place.
STICKING_OUT = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')).map(e =>
  [e.tagName, e.textContent.slice(0, 40), e.getBoundingClientRect()]).filter(([, , r]) =>
  r.width && (r.left < -0.5 || r.right > innerWidth + 0.5)).map(([t, s]) => t + ' ' + s)
"""
OVERLAPPING_WORDS = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent,
    t.getBoundingClientRect()]);
  return boxes.flatMap(([a, r], i) => boxes.slice(i + 1).filter(([, q]) =>
    Math.min(r.right, q.right) - Math.max(r.left, q.left) > 1 &&
    Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top) > 4).map(([b]) => a + ' / ' + b));
})
"""
SMALLEST_WORDS = """
Math.min(...[...document.querySelectorAll('figure svg')].flatMap(svg =>
  [...svg.querySelectorAll('text')].map(t => parseFloat(t.getAttribute('font-size'))
    * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)))
"""
GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module", params=["nvidia-h200-tp2", "nvidia-h200-tp8"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile = store.load(request.param)
    written = tmp_path_factory.mktemp("page") / "page.html"
    written.write_text(page(profile, derive(profile), advice=of_all_engines(profile)))
    return written


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 500, 1100])
def test_everything_is_in_the_window_and_can_be_read(
    tab: Browser, file: Path, width: int, scheme: Scheme
) -> None:
    tab.open(file, width, scheme)
    assert tab.ask("document.documentElement.scrollWidth") <= width
    assert tab.ask(STICKING_OUT) == []
    assert tab.ask(OVERLAPPING_WORDS) == []
    if width >= 500:
        assert tab.ask(SMALLEST_WORDS) > 9
    assert tab.complaints == []


def test_the_dark_scheme_is_dark(tab: Browser, file: Path) -> None:
    for scheme in ("light", "dark"):
        tab.open(file, 500, scheme)  # type: ignore[arg-type]
        ground = colors.literal("paper", scheme == "dark")
        shown = [int(part) for part in tab.ask(GROUND).strip("rgb()").split(",")]
        assert shown == [int(ground[i : i + 2], 16) for i in (1, 3, 5)]


def test_these_questions_find_what_they_are_for(tab: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
        "<body><div style='width:900px'>wide</div><script>1</script><figure><svg width=300 "
        "viewBox='0 0 300 50'><text y=20 font-size=10>one</text><text y=20 x=5 font-size=7>two"
        "</text></svg></figure>"
    )
    tab.open(bad, 500)
    assert tab.ask("document.documentElement.scrollWidth") <= 500  # its style was refused
    assert tab.complaints
    bad.write_text(bad.read_text().partition(">")[0] + ">" + bad.read_text().partition("<body>")[2])
    tab.open(bad, 500)
    assert tab.ask("document.documentElement.scrollWidth") > 500
    assert tab.ask(STICKING_OUT) == ["DIV wide"]
    assert tab.ask(OVERLAPPING_WORDS) == ["one / two"]
    assert tab.ask(SMALLEST_WORDS) == pytest.approx(7)
