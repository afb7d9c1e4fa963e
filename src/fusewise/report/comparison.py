"""Two profiles compared, as records. Pure; what differs is for ``profiles.compare`` to say."""

from __future__ import annotations

from typing import Any

from fusewise.operation import Op
from fusewise.profiles.compare import Change, Comparison, Disagreement
from fusewise.profiles.intervals import CONFIDENCE, median
from fusewise.profiles.plan import MIN_GAIN
from fusewise.profiles.schema import Profile
from fusewise.report.crossings import FUSABLE, OPS
from fusewise.report.table import Column, Section
from fusewise.shape import format_size

_FIELDS = (Column("field", "field"), Column("first", "first"), Column("second", "second"))
_WHERE = (
    Column("hidden_size", "hidden", align="right"),
    Column("size", "size", align="right"),
)
_DECISIONS = (
    *_WHERE,
    Column("first_path", "first runs"),
    Column("second_path", "second runs"),
    Column("cost_us", "costs\nthere", "µs", "+.2f", "right"),
    Column("cost_low_us", "low", "", "+.2f", "right", drop=1),
    Column("cost_high_us", "high", "", "+.2f", "right", drop=1),
    Column("verdict", "verdict"),
)
_TIMES = (
    *_WHERE,
    Column("path", "path"),
    Column("first_us", "first", "µs", ".2f", "right"),
    Column("second_us", "second", "µs", ".2f", "right"),
    Column("ratio", "ratio", "", ".3f", "right"),
    Column("ratio_low", "low", "", ".3f", "right", drop=1),
    Column("ratio_high", "high", "", ".3f", "right", drop=1),
    Column("verdict", "verdict"),
)


def comparison(first: Profile, second: Profile, found: Comparison, every: bool) -> list[Section]:
    """What the two are, where they decide differently, and where times differ beyond noise.

    Args:
        first: one profile.
        second: the other; ratios are its times over the first's.
        found: ``compare(first, second)``.
        every: times that do not differ, too.
    """
    ops = [op for op in OPS if any(change.op == op for change in found.changes)] or [FUSABLE]
    return [
        Section("fields", _FIELDS, _fields(first, second), "What differs", _alike(first, second)),
        *(_decisions(found, op) for op in ops),
        *(_times(found, op, every) for op in ops),
        Section("counts", (), [], "Beyond noise", tuple(_counted(found)), [_counts(found)]),
    ]


def _alike(first: Profile, second: Profile) -> tuple[str, ...]:
    return () if _fields(first, second) else ("One node, one set of versions, one date.",)


def _decisions(found: Comparison, op: Op) -> Section:
    rows = [_decision(one) for one in found.disagreements if one.op == op]
    note = "Both run the same path at every size that both measured."
    if rows:
        note = "costs there: the first one's path, where the second was measured, over its own."
    return Section("decisions", _DECISIONS, rows, f"Decisions: {op}", (note,), _data(rows))


def _times(found: Comparison, op: Op, every: bool) -> Section:
    changes = [change for change in found.changes if change.op == op]
    rows = [_time(c) for c in changes if every or c.verdict in ("faster", "slower")]
    notes = (
        []
        if rows
        else [f"None of {len(changes)} is known to differ beyond noise; --all shows all."]
    )
    return Section("times", _TIMES, rows, f"Times: {op}", tuple(notes), _data(rows))


def _data(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what only people need."""
    return [{key: value for key, value in row.items() if key != "size"} for row in rows]


def _fields(first: Profile, second: Profile) -> list[dict[str, Any]]:
    pairs = [
        {
            **p.fingerprint.model_dump(),
            "baseline": p.baseline,
            **p.provenance.model_dump(include={"origin", "created", "extends", "fusewise"}),
        }
        for p in (first, second)
    ]
    return [
        {"field": name, "first": pairs[0][name], "second": pairs[1][name]}
        for name in pairs[0]
        if pairs[0][name] != pairs[1][name]
    ]


def _decision(one: Disagreement) -> dict[str, Any]:
    spread = one.cost if one.clear in ("clear", "noise") else None
    return {
        **_where(one),
        "first_path": one.first_path,
        "second_path": one.second_path,
        "cost_us": one.cost.median if one.cost else None,
        "cost_low_us": spread.low if spread else None,
        "cost_high_us": spread.high if spread else None,
        "verdict": one.clear,
    }


def _time(one: Change) -> dict[str, Any]:
    spread = None if one.verdict == "no spread" else one.ratio
    return {
        **_where(one),
        "path": one.path,
        "first_us": one.first_us,
        "second_us": one.second_us,
        "ratio": one.ratio.median,
        "ratio_low": spread.low if spread else None,
        "ratio_high": spread.high if spread else None,
        "verdict": one.verdict,
    }


def _where(one: Change | Disagreement) -> dict[str, Any]:
    return {
        "op": one.op,
        "hidden_size": one.shape.hidden_size,
        "num_tokens": one.shape.num_tokens,
        "message_bytes": one.shape.message_bytes,
        "size": format_size(one.shape.message_bytes),
    }


def _counts(found: Comparison) -> dict[str, Any]:
    counts = _verdicts(found)
    return {
        "common": len(found.changes),
        "faster": counts["faster"],
        "slower": counts["slower"],
        "no_spread": counts["no spread"],
        "ratio": median([c.ratio.median for c in found.changes]) if found.changes else None,
        "first_only": found.first_only,
        "second_only": found.second_only,
    }


def _verdicts(found: Comparison) -> dict[str, int]:
    counts = dict.fromkeys(("faster", "slower", "same", "no spread"), 0)
    for change in found.changes:
        counts[change.verdict] += 1
    return counts


def _counted(found: Comparison) -> list[str]:
    counts = _verdicts(found)
    told = counts["faster"] + counts["slower"]
    lines = [
        f"{told} of {len(found.changes)} common times differ beyond noise: the second is slower at "
        f"{counts['slower']} and faster at {counts['faster']} ({CONFIDENCE:.0%} interval of the "
        f"ratio of medians, clear of {MIN_GAIN:.0%})."
    ]
    if found.changes:
        middle = median([change.ratio.median for change in found.changes])
        lines.append(f"Second ÷ first, median of all: {middle:.3f}.")
    if counts["no spread"]:
        lines.append(f"{counts['no spread']} were published without a spread: nobody can tell.")
    if found.first_only or found.second_only:
        lines.append(f"Only in the first: {found.first_only}; only in the second: "
                     f"{found.second_only}.")  # fmt: skip
    return lines
