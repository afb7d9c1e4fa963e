"""One HTML page of a profile, from the same records as every other report.

The page stands alone: no script, no font, no style sheet and no picture from elsewhere, which its
own content policy enforces. Everything that comes from a profile is escaped. Pure.
"""

from __future__ import annotations

import re
from html import escape

from fusewise.profiles.bands import Plan
from fusewise.profiles.plan import MIN_GAIN
from fusewise.profiles.schema import Profile
from fusewise.report.crossings import crossings
from fusewise.report.plot import caption, picture
from fusewise.report.records import identity, report
from fusewise.report.table import UNBROKEN_CHARS, Column, Section, cells, printable

_STYLE = """
:root { color-scheme: light; --ink: #1d2530; --soft: #5b6675; --line: #e2e6eb; }
body { margin: 2.5rem auto; max-width: 76rem; padding: 0 1.25rem; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.lead { color: var(--soft); margin: .2rem 0 1.6rem; }
.summary { margin: 1rem 0; padding: .7rem 1rem; border-left: 4px solid #332288;
  background: #f5f6fa; }
figure { margin: 1.6rem 0; } figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .28rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; white-space: nowrap; color: var(--soft); font-weight: 600; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 18rem; }
td.right, th.right { text-align: right; }
tbody tr:hover { background: #f7f8fa; }
.chosen { font-weight: 700; background: #e9f3ec; }
.fuse { color: #11602c; font-weight: 600; } .do-not-fuse { color: #9a3412; font-weight: 600; }
.inconclusive { color: var(--soft); }
.note { color: var(--soft); font-size: .87rem; margin: .4rem 0; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(profile: Profile, plan: Plan, min_gain: float = MIN_GAIN) -> str:
    """The page.

    Args:
        profile: what was measured.
        plan: ``derive(profile, min_gain)``, or what replaced it.
        min_gain: as the plan was derived.

    Raises:
        InputError: the profile has no sample of ``all_reduce_rms_norm``.
    """
    title = f"fusewise: {caption(profile)}"
    provenance = profile.provenance
    lead = f"{provenance.origin} {provenance.created}, {provenance.source}"
    about = identity(profile)
    rest = [table for table in report(profile, plan, min_gain) if table.name != about.name]
    tables = sorted(rest, key=lambda table: table.name not in ("bands", "crossovers"))
    verdict = " ".join(crossings(profile, min_gain).notes)
    body = [
        f"<h1>{_text(caption(profile))}</h1>",
        f"<p class=lead>all_reduce → + residual → RMSNorm · {_text(lead)}</p>",
        f"<p class=summary>{_text(verdict)}</p>",
        f'<figure role="img" aria-label="{_text(title)}">{_inline(picture(profile, plan, "svg"))}',
        "</figure>",
        *(_table(section) for section in (*tables, about)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(section: Section) -> str:
    head = "".join(f"<th{_side(c)}>{_text(c.head, '<br>')}</th>" for c in section.columns)
    rows = "\n".join(
        "<tr>" + "".join(_cell(cell, c) for cell, c in zip(row, section.columns, strict=True))
        + "</tr>"
        for row in cells(section)
    )  # fmt: skip
    notes = "".join(f"<p class=note>{_text(note)}</p>" for note in section.notes)
    return (
        f'<h2 id="{_anchor(section)}">{_text(section.title or section.name)}</h2>\n'
        f"<div class=scroll><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>\n{notes}"
    )


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (section.title or section.name).lower()).strip("-")


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


def _inline(svg: bytes) -> str:
    """The ``<svg>`` element alone: no XML prologue, no metadata."""
    text = svg.decode("utf-8")
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
