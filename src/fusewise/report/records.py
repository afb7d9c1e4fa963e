"""Profile and plan → flat records with their columns, as ``table.Section``. Pure conversions.

What JSON and CSV hold (``Section.data``) has a ``dtype`` in every row, so that the tables of
several profiles are one table.

Text, JSON, CSV, Markdown, pictures' captions and the HTML page are all made from these. Nothing
here decides: decisions come from ``fusewise.profiles.plan`` and are only written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusewise.operation import Op
from fusewise.profiles.bands import Plan
from fusewise.profiles.intervals import CONFIDENCE, median, median_interval
from fusewise.profiles.plan import Point, decide_points
from fusewise.profiles.schema import Profile, Sample
from fusewise.report.crossings import FUSABLE, OPS, crossings, rounded_size
from fusewise.report.table import Column, Section, facts, spoken
from fusewise.shape import format_size

Record = dict[str, Any]


def report(profile: Profile, plan: Plan) -> list[Section]:
    """What a report shows: every table that says something. See ``tables``."""
    return spoken(tables(profile, plan))


def tables(profile: Profile, plan: Plan) -> list[Section]:
    """Every table of a profile, empty ones too; the decision last, where a terminal ends.

    Args:
        profile: what was measured.
        plan: ``derive(profile)``, or what replaced it.
    """
    return [
        identity(profile),
        paths(profile),
        *(measurements(profile, op) for op in OPS),
        excluded(profile),
        *(bands(plan, op) for op in _ops(plan)),
        *(crossings(profile, op) for op in OPS),
    ]


def identity(profile: Profile) -> Section:
    """The fingerprint and the provenance: one row per known field."""
    known = {
        "dtype": profile.dtype,
        "baseline": profile.baseline,
        **profile.fingerprint.model_dump(),
        **profile.provenance.model_dump(),
    }
    shown = [(key, value) for key, value in known.items() if value != ""]
    return facts("profile", known, shown, "Node and provenance")


def measurements(profile: Profile, op: Op = FUSABLE) -> Section:
    """Shown: one row per (op, hidden size, message size), a column per path.

    ``gain_us`` is the median over paired rounds of best unfused minus best fused, above zero where
    fusing wins. A publication without its rounds gives no interval: both ends are None. For
    ``all_reduce`` there is nothing to fuse: gains and verdict are None. The data have a row per
    path.
    """
    present = {sample.path for sample in profile.samples if sample.op == op}
    known = [path.name for path in profile.paths if path.name in present]
    names = known + sorted(present - set(known))
    decided = decide_points(profile, op)
    points = [point for column in decided.values() for point in column]
    paired = any(len(sample.times_us) > 1 for sample in profile.samples)
    records = [_measurement(op, point, names, paired) for point in points]
    fusable = op == FUSABLE and any(record["gain_us"] is not None for record in records)
    drop = _drop_order(points, names, {p.name for p in profile.paths if p.fused})
    columns = (
        Column("hidden_size", "hidden", align="right"),
        Column("num_tokens", "tokens", align="right", drop=40),
        Column("size", "size", align="right"),
        *(
            Column(f"median_us[{n}]", _broken(n), "", ".2f", "right", ("chosen", n), drop[n])
            for n in names
        ),
        *(c for c in _GAIN_COLUMNS if fusable and (paired or c.key not in _SPREAD)),
        *((Column("note", "note", drop=200),) if any(r["note"] for r in records) else ()),
    )
    notes = ["Times: median µs per call, slowest rank; * is the chosen path."]
    if fusable:
        notes.append(_PAIRED if paired else _UNPAIRED)
    timed = profile.points(op)
    data = [
        row
        for point, record in zip(points, records, strict=True)
        for row in _times(timed[point.shape.hidden_size][point.shape], record, names)
    ]
    data = [{"dtype": profile.dtype} | row for row in data]
    title = f"Measurements: {op}"
    return Section("measurements", columns, records, title, tuple(notes) if records else (), data)


_PAIRED = (
    "fusing saves: median over paired rounds of best unfused − best fused, which is not the "
    f"difference of the medians; low and high: its {CONFIDENCE:.0%} interval."
)
_UNPAIRED = (
    "fusing saves: best unfused − best fused, of the times as published; no interval was published."
)
_GAIN_COLUMNS = (
    Column("gain_us", "fusing\nsaves", "µs", "+.2f", "right"),
    Column("gain_low_us", "low", "", "+.2f", "right", drop=30),
    Column("gain_high_us", "high", "", "+.2f", "right", drop=30),
    Column("verdict", "verdict"),
)
_SPREAD = ("gain_low_us", "gain_high_us")


def _drop_order(points: list[Point], names: list[str], fused: set[str]) -> dict[str, int]:
    """Where room is short: the slowest path goes first, and last what is chosen somewhere.

    The best fused and the best unfused path count as chosen: the two are what is compared.
    """

    def worth(name: str) -> tuple[int, float]:
        lost = [
            p.medians_us[name] / p.medians_us[p.fastest] for p in points if name in p.medians_us
        ]
        return sum(p.chosen == name for p in points), -median(lost)

    ranked = sorted(names, key=worth, reverse=True)
    kept = {point.chosen for point in points}
    for side in (fused, set(names) - fused):
        kept |= set([name for name in ranked if name in side][:1])
    return {name: (1 if name in kept else 100) + i for i, name in enumerate(ranked)}


def _times(row: Mapping[str, Sample], record: Record, names: list[str]) -> list[Record]:
    """One row per path: its times, and what was decided at this point."""
    shared = {key: record[key] for key in ("gain_us", *_SPREAD, "verdict", "note")}
    made = []
    for name in (name for name in names if name in row):
        span = median_interval(row[name].times_us)
        spread = len(row[name].times_us) > 1
        made.append(
            {
                **{k: record[k] for k in ("op", "hidden_size", "num_tokens", "message_bytes")},
                "path": name,
                "time_us": span.median,
                "time_low_us": span.low if spread else None,
                "time_high_us": span.high if spread else None,
                "rounds": len(row[name].times_us),
                "chosen": record["chosen"] == name,
                "fastest": record["fastest"] == name,
                **shared,
            }
        )
    return made


def _measurement(op: Op, point: Point, names: list[str], paired: bool) -> Record:
    gain = point.gain if op == FUSABLE else None
    return {
        "op": op,
        "hidden_size": point.shape.hidden_size,
        "num_tokens": point.shape.num_tokens,
        "message_bytes": point.shape.message_bytes,
        "size": format_size(point.shape.message_bytes),
        **{f"median_us[{name}]": point.medians_us.get(name) for name in names},
        "fastest": point.fastest,
        "chosen": point.chosen,
        "gain_us": gain.median if gain else None,
        "gain_low_us": gain.low if gain and paired else None,
        "gain_high_us": gain.high if gain and paired else None,
        "verdict": point.verdict if op == FUSABLE else None,
        "note": point.note or None,
    }


def _broken(path: str) -> str:
    """A path's name as a narrow head: ``symm_mem``, ``.one_shot``, ``+ rms_norm``."""
    return path.replace(".", "\n.").replace(" + ", "\n+ ")


def _ops(plan: Plan) -> list[Op]:
    """Those the plan decides; the fusable one where it decides nothing."""
    return [op for op in OPS if any(table.op == op for table in plan.tables)] or [FUSABLE]


def bands(plan: Plan, op: Op = FUSABLE) -> Section:
    """The decision on one operation: sizes ``min_bytes <= size < end_bytes`` run ``path``.

    ``end_bytes`` is None where a band has no end.
    """
    rows = _bands(plan, op)
    data = [{k: v for k, v in row.items() if k not in _SHOWN_ENDS} for row in rows]
    note = f"Where nothing was decided: {plan.baseline}. Source: {plan.source}"
    notes = (note,) if op == FUSABLE else ()
    columns = tuple(c for c in _BAND_COLUMNS if op == FUSABLE or c.key != "verdict")
    return Section("bands", columns, rows, f"Decision: {op}", notes, data)


_SHOWN_ENDS = ("from", "to")
_BAND_COLUMNS = (
    Column("hidden_size", "hidden", align="right"),
    Column("from", "from", align="right"),
    Column("to", "to", align="right"),
    Column("path", "path"),
    Column("verdict", "verdict"),
    Column("origin", "origin"),
)


def _bands(plan: Plan, op: Op) -> list[Record]:
    return [
        {
            "dtype": plan.dtype,
            "op": op,
            "hidden_size": table.hidden_size,
            "min_bytes": band.min_bytes,
            "end_bytes": band.end_bytes,
            "from": rounded_size(band.min_bytes),
            "to": rounded_size(band.end_bytes) if band.end_bytes is not None else "…",
            "path": band.path,
            "verdict": band.verdict if op == FUSABLE else None,
            "origin": band.origin,
        }
        for table in plan.tables
        if table.op == op
        for band in table.bands
    ]


def paths(profile: Profile) -> Section:
    """What was measured, by whom it is provided, and where each path rounds."""
    records = [
        {
            "dtype": profile.dtype,
            "path": path.name,
            "provider": path.provider,
            "fused": path.fused,
            "accumulation": path.numerics.accumulation if path.numerics else None,
            "order": path.numerics.order if path.numerics else None,
            "rounds_sum": path.numerics.rounds_sum if path.numerics else None,
        }
        for path in profile.paths
    ]
    columns = (
        Column("path", "path"),
        Column("provider", "provider"),
        Column("fused", "fused"),
        Column("accumulation", "adds in"),
        Column("order", "order\nof sum"),
        Column("rounds_sum", "rounds\nthe sum"),
    )
    return Section("paths", columns, records, "Paths measured")


def excluded(profile: Profile) -> Section:
    """Backends that were not timed, each with its reason."""
    records = [
        {"dtype": profile.dtype, "backend": item.backend, "reason": item.reason}
        for item in profile.excluded
    ]
    columns = (Column("backend", "backend"), Column("reason", "reason"))
    return Section("excluded", columns, records, "Not measured")
