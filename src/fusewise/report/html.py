"""One HTML page of a profile: what to do, the picture, every table, from the reports' own records.

The page stands alone: no script, no font, no style sheet and no picture from elsewhere, which its
own content policy enforces; light or dark as the reader's system is. Everything that comes from a
profile is escaped. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from itertools import groupby

from fusewise.profiles.bands import Plan
from fusewise.profiles.intervals import CONFIDENCE
from fusewise.profiles.schema import Profile
from fusewise.report import colors
from fusewise.report.advice import Advice, losing, of_all_engines
from fusewise.report.crossings import FUSABLE, crossings, rounded_size
from fusewise.report.drawing import Area, Drawing, Item, Line, moved, rectangle, svg
from fusewise.report.plot import caption, key, panels, paths_drawn
from fusewise.report.records import identity, report
from fusewise.report.table import UNBROKEN_CHARS, Column, Section, cells, printable
from fusewise.shape import format_size

REPOSITORY = "https://github.com/fusewise/fusewise"  # as in pyproject.toml
_DOCS = f"{REPOSITORY}/blob/main/docs"
_LINKS = (
    (f"{_DOCS}/vllm.md", "Using the cap or the plugin in vLLM"),
    (f"{_DOCS}/design.md", "How this was measured and decided"),
    (f"{_DOCS}/reference.md", "Environment variables and exit codes"),
    ("https://github.com/vllm-project/vllm/issues/44079", "The report that started this"),
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PANEL = 470.0  # px; a page scales it to its column


def page(profile: Profile, plan: Plan, advice: Sequence[Advice] | None = None) -> str:
    """The page.

    Args:
        profile: what was measured.
        plan: ``derive(profile)``, or what replaced it.
        advice: what to do about engines; by default about each, with its own defaults.

    Raises:
        InputError: the profile has no sample of ``all_reduce_rms_norm``.
    """
    title = f"fusewise: {caption(profile)}"
    provenance = profile.provenance
    lead = f"{provenance.origin} {provenance.created}, {provenance.source}"
    about = identity(profile)
    rest = [table for table in report(profile, plan) if table.name != about.name]
    tables = sorted(rest, key=lambda table: table.name not in ("bands", "crossovers"))
    verdict = " ".join(crossings(profile).notes)
    body = [
        f"<h1>{_text(caption(profile))}</h1>",
        f"<p class=lead>all_reduce → + residual → RMSNorm · {_text(lead)}</p>",
        f"<p class=summary>{_text(verdict)}</p>",
        _next(profile, of_all_engines(profile) if advice is None else advice),
        _pictures(profile, plan),
        *(_table(section) for section in (*tables, about)),
    ]
    style = resources.files("fusewise").joinpath("report", "page.css").read_text("utf-8")
    shades = (
        f":root {{ color-scheme: light dark; {colors.sheet()} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {colors.sheet(dark=True)} }} }}\n"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{shades}{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _next(profile: Profile, advice: Sequence[Advice]) -> str:
    cards = "\n".join(_card(one) for one in advice)
    if profile.fingerprint.device_type == "cpu":
        cards = (
            "<p>These are CPU ranks, which no engine's table is about. On a GPU node this part "
            "names each engine's losing bands and the cap that cures them.</p>"
        )
    links = "\n".join(f'<li><a href="{url}">{words}</a></li>' for url, words in _LINKS)
    use = (
        "<p class=note>In Python <code>fusewise.Communicator()</code> runs the decision below; "
        "on this node engines' plugins find this profile by themselves.</p>"
    )
    return (
        f'<h2 id="next">What to do next</h2>\n<div class=cards>{cards}</div>\n{use}\n'
        f"<ul class=links>\n{links}\n</ul>"
    )


def _card(advice: Advice) -> str:
    facts: list[tuple[str, str]] = []
    audit = advice.audit
    if audit is not None and advice.cures and audit.cap.cap_bytes is not None:
        size = audit.cap.cap_bytes
        facts = [
            ("cap", f"<span class=big>{format_size(size)}</span> ({size} bytes)"),
            ("because", _text(audit.cap.why)),
        ]
        pasted = [("flag", audit.flag), ("environment", audit.environment)]
        facts += [(k, f"<pre><code>{_text(v)}</code></pre>") for k, v in pasted if v is not None]
        bands = "".join(f"<li>{_text(losing(band))}</li>" for band in audit.bands)
        facts += [("losing", f"<ul>{bands}</ul>")] if bands else []
    if audit is not None and audit.own is not None:
        facts.append(("our kernels", _text(str(audit.own))))
    listed = "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return (
        f"<section class=card><h3>{_text(advice.engine)}</h3>\n<p>{_text(advice.headline)}</p>\n"
        + (f"<dl>\n{listed}\n</dl>" if listed else "")
        + "</section>"
    )


def _pictures(profile: Profile, plan: Plan) -> str:
    figures = "\n".join(
        f"<figure>{svg(sheet, colors.variable, f'hidden {hidden_size}, {caption(profile)}')}"
        f"<figcaption>{_winners(plan, hidden_size)}</figcaption></figure>"
        for hidden_size, sheet in panels(profile, plan, _PANEL).items()
    )
    paths = "".join(
        f"<li>{_icon(moved(key(path), 3, 9))}{_text(path)}</li>" for path in paths_drawn(profile)
    )
    marks = "".join(f"<li>{_icon(items)}{words}</li>" for items, words in _marks())
    return (
        f'<h2 id="times">Times</h2>\n<div class=panels>\n{figures}\n</div>\n'
        f'<ul class="legend">{paths}</ul>\n<ul class="legend marks">{marks}</ul>'
    )


def _winners(plan: Plan, hidden_size: int) -> str:
    """Which path runs up to which size, in words."""
    table = plan.table_for(FUSABLE, hidden_size)
    if table is None:
        return ""
    known = [band for band in table.bands if band.min_bytes <= table.validated_to]
    runs = [(path, list(bands)[-1]) for path, bands in groupby(known, lambda band: band.path)]
    return "; ".join(
        f"<b>{_text(path)}</b> up to "
        f"{rounded_size(min(last.end_bytes or table.validated_to, table.validated_to))}"
        for path, last in runs
    )


def _marks() -> list[tuple[list[Item], str]]:
    """Every mark of the picture that is not a path, with what it means."""
    ink = "soft"
    middle = ((3.0, 9.0), (31.0, 9.0))
    return [
        ([Line(middle, ink, 1.6)], "solid: fused, one kernel"),
        ([Line(middle, ink, 1.6, (5, 3))], "dashed: an all-reduce, then the norm"),
        ([Line(middle, ink, 1.6, (1.5, 3))], "dots: a variant of our kernel"),
        ([Line(middle, ink, 7, (), 0.3), Line(middle, ink, 1.4)], "broad shade: the plan runs it"),
        (
            [Area(rectangle(3, 4, 31, 14), ink, 0.22), Line(middle, ink, 1.4)],
            f"light shade: {CONFIDENCE:.0%} interval of the median",
        ),
        ([Area(rectangle(3, 4, 31, 14), ink)], "bar: what the plan runs, over measured sizes"),
        ([Line(((17, 1), (17, 17)), "ink", 1, (1, 2.5))], "dotted line: a crossover"),
        (
            [Area(rectangle(8, 1, 26, 17), "ink", 0.12)],
            "grey column: the measured sizes around it",
        ),
        ([Area(rectangle(3, 2, 31, 16), "good-ground")], "* in a table: the path chosen there"),
    ]


def _icon(items: Sequence[Item]) -> str:
    drawn = svg(Drawing(34, 18, tuple(items)), colors.variable, "")
    return drawn.replace("<title></title>", "").replace('role="img"', 'aria-hidden="true"')


def _table(section: Section) -> str:
    head = "".join(f"<th{_side(c)}>{_text(c.head, '<br>')}</th>" for c in section.columns)
    rows = "\n".join(
        "<tr>" + "".join(_cell(cell, c) for cell, c in zip(row, section.columns, strict=True))
        + "</tr>"
        for row in cells(section)
    )  # fmt: skip
    table = (
        f"<div class=scroll><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>\n"
    )
    notes = "".join(f"<p class=note>{_text(note)}</p>" for note in section.notes)
    return (
        f'<h2 id="{_anchor(section)}">{_text(section.title or section.name)}</h2>\n'
        + (table if rows or not notes else "")
        + notes
    )


def _anchor(section: Section) -> str:
    """Its name; that of the second operation's table of one name is told apart."""
    return section.name + ("-all_reduce" if (section.title or "").endswith(": all_reduce") else "")


def _cell(cell: str, column: Column) -> str:
    if column.star and cell.startswith("*"):
        return f'<td class="right chosen">{_text(cell)}</td>'
    if cell in ("fuse", "do not fuse", "inconclusive"):
        return f'<td class="{cell.replace(" ", "-")}">{cell}</td>'
    if len(cell) > UNBROKEN_CHARS:
        return f'<td class="long">{_text(cell)}</td>'
    return f"<td{_side(column)}>{_text(cell)}</td>"


def _side(column: Column) -> str:
    return ' class="right"' if column.align == "right" else ""


def _text(text: str, newline: str = " ") -> str:
    """Escaped for an element or a quoted attribute; a line break becomes ``newline``."""
    return newline.join(escape(printable(line)) for line in text.split("\n"))
