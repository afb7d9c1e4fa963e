"""Profile and plan → flat records with their columns, as ``table.Section``. Pure conversions.

Text, JSON, CSV, Markdown, pictures' captions and the HTML page are all made from these. Nothing
here decides: decisions come from ``fusewise.profiles.plan`` and are only written down.
"""

from __future__ import annotations

from typing import Any

from fusewise.operation import Op
from fusewise.profiles.bands import Plan
from fusewise.profiles.intervals import CONFIDENCE
from fusewise.profiles.plan import MIN_GAIN, Point, decide_points
from fusewise.profiles.schema import Profile
from fusewise.report.crossings import FUSABLE, OPS, crossings, rounded_size
from fusewise.report.table import Column, Section
from fusewise.shape import format_size

Record = dict[str, Any]


def report(profile: Profile, plan: Plan, min_gain: float = MIN_GAIN) -> list[Section]:
    """Every section of a report but the empty ones; the decision last, where a terminal ends.

    Args:
        profile: what was measured.
        plan: ``derive(profile, min_gain)``, or what replaced it.
        min_gain: as the plan was derived.
    """
    sections = [
        identity(profile),
        paths(profile),
        *(measurements(profile, op, min_gain) for op in OPS),
        excluded(profile),
        bands(plan),
        crossings(profile, min_gain),
    ]
    return [section for section in sections if section.records or section.notes]


def identity(profile: Profile) -> Section:
    """The fingerprint and the provenance: one row per known field."""
    known = {
        "dtype": profile.dtype,
        "baseline": profile.baseline,
        **profile.fingerprint.model_dump(exclude_none=True),
        **profile.provenance.model_dump(exclude_none=True),
    }
    records = [{"field": key, "value": value} for key, value in known.items() if value != ""]
    columns = (Column("field", "field"), Column("value", "value"))
    return Section("identity", columns, records, "Node and provenance")


def measurements(profile: Profile, op: Op = FUSABLE, min_gain: float = MIN_GAIN) -> Section:
    """One row per (op, hidden size, message size).

    Keys: ``median_us[PATH]`` for every path (None where it was not admitted), ``gain_us`` with
    ``gain_low_us`` and ``gain_high_us``: best unfused minus best fused, above zero where fusing
    wins. A publication without its rounds gives no interval: both ends are None. For
    ``all_reduce`` there is nothing to fuse: gains and verdict are None.
    """
    present = {sample.path for sample in profile.samples if sample.op == op}
    known = [path.name for path in profile.paths if path.name in present]
    names = known + sorted(present - set(known))
    decided = decide_points(profile, op, min_gain)
    paired = any(len(sample.times_us) > 1 for sample in profile.samples)
    records = [
        _measurement(op, point, names, paired) for column in decided.values() for point in column
    ]
    fusable = op == FUSABLE and any(record["gain_us"] is not None for record in records)
    columns = (
        Column("hidden_size", "hidden", align="right"),
        Column("num_tokens", "tokens", align="right"),
        Column("size", "size", align="right"),
        *(Column(f"median_us[{n}]", _broken(n), "", ".2f", "right", ("chosen", n)) for n in names),
        *(c for c in _GAIN_COLUMNS if fusable and (paired or c.key not in _SPREAD)),
        *((Column("note", "note"),) if any(record["note"] for record in records) else ()),
    )
    notes = ["Times: median µs per call, slowest rank; * is the chosen path."]
    if fusable:
        notes.append(
            "fusing saves = best unfused − best fused; interval: "
            + (f"{CONFIDENCE:.0%} of paired rounds." if paired else "none was published.")
        )
    title = f"Measurements: {op}"
    return Section(f"measurements_{op}", columns, records, title, tuple(notes) if records else ())


_GAIN_COLUMNS = (
    Column("gain_us", "fusing\nsaves", "µs", "+.2f", "right"),
    Column("gain_low_us", "low", "", "+.2f", "right"),
    Column("gain_high_us", "high", "", "+.2f", "right"),
    Column("verdict", "verdict"),
)
_SPREAD = ("gain_low_us", "gain_high_us")


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


def bands(plan: Plan) -> Section:
    """The decision: sizes ``min_bytes <= size < end_bytes`` run ``path``; no end is None."""
    records = [
        {
            "op": table.op,
            "hidden_size": table.hidden_size,
            "min_bytes": band.min_bytes,
            "end_bytes": band.end_bytes,
            "from": rounded_size(band.min_bytes),
            "to": rounded_size(band.end_bytes) if band.end_bytes is not None else "…",
            "path": band.path,
            "verdict": band.verdict if table.op == FUSABLE else None,
            "origin": band.origin,
        }
        for table in plan.tables
        for band in table.bands
    ]
    columns = (
        Column("op", "op"),
        Column("hidden_size", "hidden", align="right"),
        Column("from", "from", align="right"),
        Column("to", "to", align="right"),
        Column("path", "path"),
        Column("verdict", "verdict"),
        Column("origin", "origin"),
    )
    note = f"Where nothing was decided: {plan.baseline}. Source: {plan.source}"
    return Section("bands", columns, records, "Decision", (note,))


def paths(profile: Profile) -> Section:
    """What was measured, by whom it is provided, and where each path rounds."""
    records = [
        {
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
        Column("accumulation", "accumulation"),
        Column("order", "order of sum"),
        Column("rounds_sum", "rounds the sum"),
    )
    return Section("paths", columns, records, "Paths measured")


def excluded(profile: Profile) -> Section:
    """Backends that were not timed, each with its reason."""
    records = [{"path": item.backend, "reason": item.reason} for item in profile.excluded]
    columns = (Column("path", "path"), Column("reason", "reason"))
    return Section("excluded", columns, records, "Not measured")
