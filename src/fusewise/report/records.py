"""Profile and plan → flat records with their columns, as ``table.Section``. Pure conversions.

Text, JSON, CSV, Markdown, pictures' captions and the HTML page are all made from these. Nothing
here decides: decisions come from ``fusewise.plan`` and are only written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusewise.bands import Plan
from fusewise.intervals import CONFIDENCE
from fusewise.plan import (
    MIN_GAIN,
    Crossover,
    Point,
    constant_in_bytes,
    crossovers,
    decide_points,
)
from fusewise.profile import Profile
from fusewise.report.table import Column, Section
from fusewise.shape import Op, format_size

FUSABLE: Op = "all_reduce_rms_norm"
OPS: tuple[Op, ...] = (FUSABLE, "all_reduce")
NO_LIMIT = 2**62  # above every size a profile can hold

Record = dict[str, Any]


def report(profile: Profile, plan: Plan, min_gain: float = MIN_GAIN) -> list[Section]:
    """Every section of a report, in reading order; sections with nothing in them are left out.

    Args:
        profile: what was measured.
        plan: ``derive(profile, min_gain)``, or what replaced it.
        min_gain: as the plan was derived.
    """
    sections = [
        identity(profile),
        bands(plan),
        crossings(profile, min_gain),
        *(measurements(profile, op, min_gain) for op in OPS),
        paths(profile),
        excluded(profile),
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
    wins. For ``all_reduce`` there is nothing to fuse: gains and verdict are None.
    """
    present = {sample.path for sample in profile.samples if sample.op == op}
    known = [path.name for path in profile.paths if path.name in present]
    names = known + sorted(present - set(known))
    decided = decide_points(profile, op, min_gain)
    records = [_measurement(op, point, names) for column in decided.values() for point in column]
    fusable = op == FUSABLE and any(record["gain_us"] is not None for record in records)
    columns = (
        Column("hidden_size", "hidden", align="right"),
        Column("num_tokens", "tokens", align="right"),
        Column("size", "size", align="right"),
        *(Column(f"median_us[{n}]", _broken(n), "", ".2f", "right", ("chosen", n)) for n in names),
        *(_GAIN_COLUMNS if fusable else ()),
        *((Column("note", "note"),) if any(record["note"] for record in records) else ()),
    )
    notes = ["Times: median µs per call, slowest rank; * is the chosen path."]
    if fusable:
        notes.append(
            "fusing saves = best unfused − best fused; interval: "
            + (f"{CONFIDENCE:.0%} of paired rounds." if _paired(profile) else "none was published.")
        )
    return Section(f"measurements_{op}", columns, records, op, tuple(notes) if records else ())


_GAIN_COLUMNS = (
    Column("gain_us", "fusing\nsaves", "µs", "+.2f", "right"),
    Column("gain_low_us", "low", "", "+.2f", "right"),
    Column("gain_high_us", "high", "", "+.2f", "right"),
    Column("verdict", "verdict"),
)


def _measurement(op: Op, point: Point, names: list[str]) -> Record:
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
        "gain_low_us": gain.low if gain else None,
        "gain_high_us": gain.high if gain else None,
        "verdict": point.verdict if op == FUSABLE else None,
        "note": point.note or None,
    }


def _broken(path: str) -> str:
    """A path's name as a narrow head: ``symm_mem``, ``.one_shot``, ``+ rms_norm``."""
    return path.replace(".", "\n.").replace(" + ", "\n+ ")


def _paired(profile: Profile) -> bool:
    return any(len(sample.times_us) > 1 for sample in profile.samples)


def bands(plan: Plan) -> Section:
    """The decision: sizes ``min_bytes <= size < end_bytes`` run ``path``; no end is None."""
    records = [
        {
            "op": table.op,
            "hidden_size": table.hidden_size,
            "min_bytes": band.min_bytes,
            "end_bytes": band.end_bytes,
            "from": format_size(band.min_bytes) if band.min_bytes else "0",
            "to": format_size(band.end_bytes) if band.end_bytes is not None else "…",
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


def crossings(profile: Profile, min_gain: float = MIN_GAIN) -> Section:
    """Where the winner changes, and in a note whether that is constant in bytes.

    ``above_bytes`` and ``below_bytes`` are the measured sizes on both sides, ``estimate_bytes``
    the interpolated place between them; a published crossover has all three equal.
    """
    decided = {op: decide_points(profile, op, min_gain) for op in OPS}
    found = [(op, crossing) for op in OPS for crossing in crossovers(decided[op])]
    records = [
        _crossing(op, c.hidden_size, c.above_bytes, c.below_bytes, c.estimate_bytes, c)
        for op, c in found
    ]
    records += [
        _crossing(FUSABLE, c.hidden_size, c.message_bytes, c.message_bytes, c.message_bytes)
        for c in profile.crossovers
    ]
    columns = (
        Column("op", "op"),
        Column("hidden_size", "hidden", align="right"),
        Column("before", "up to it"),
        Column("after", "above it"),
        Column("between", "between"),
        Column("near", "near", align="right"),
    )
    note = constancy(fusion_brackets(profile, decided[FUSABLE]))
    return Section("crossovers", columns, records, "Crossovers", (note,))


def _crossing(
    op: Op, hidden_size: int, above: int, below: int, estimate: int, c: Crossover | None = None
) -> Record:
    return {
        "op": op,
        "hidden_size": hidden_size,
        "before": c.before if c else None,
        "after": c.after if c else None,
        "above_bytes": above,
        "below_bytes": below,
        "estimate_bytes": estimate,
        "between": f"{format_size(above)} and {format_size(below)}" if c else "as published",
        "near": rounded_size(estimate),
    }


def rounded_size(size_bytes: int) -> str:
    """An estimate as ``4.38M``: three digits, for it is known no better."""
    unit = next((2**power for power in (30, 20, 10) if size_bytes >= 2**power), 1)
    value = size_bytes / unit
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return digits + {2**30: "G", 2**20: "M", 2**10: "K", 1: "B"}[unit]


def fusion_brackets(
    profile: Profile, points: Mapping[int, list[Point]]
) -> dict[int, tuple[int, int]]:
    """hidden_size → the sizes between which fusing stops to win, for the last such change.

    A hidden size whose largest measured message is still fused has its change above that size, up
    to ``NO_LIMIT``; one that never fuses has none. A published crossover is its own bracket.
    """
    fused = {path.name for path in profile.paths if path.fused}
    brackets = {c.hidden_size: (c.message_bytes, c.message_bytes) for c in profile.crossovers}
    for crossing in crossovers(points):
        if crossing.before in fused and crossing.after not in fused:
            brackets[crossing.hidden_size] = (crossing.above_bytes, crossing.below_bytes)
    for hidden_size, column in points.items():
        if column[-1].chosen in fused:
            brackets[hidden_size] = (column[-1].shape.message_bytes, NO_LIMIT)
    return brackets


def constancy(brackets: Mapping[int, tuple[int, int]]) -> str:
    """The sentence on whether one size in bytes ends the fusion at every hidden size."""
    if all(high == NO_LIMIT for _, high in brackets.values()):
        return "No measured size at which fusing stops to win."
    places = "; ".join(
        f"{_place(low, high)} at hidden {hidden_size}"
        for hidden_size, (low, high) in sorted(brackets.items())
    )
    verdict = constant_in_bytes(brackets)
    if verdict is None:
        return (
            f"Fusing stops to win {places}. Constant in bytes: unknown: one hidden size measured."
        )
    return f"Fusing stops to win {places}. Constant in bytes: {'possible' if verdict else 'no'}."


def _place(low: int, high: int) -> str:
    if high == NO_LIMIT:
        return f"above {format_size(low)}"
    if low == high:
        return f"at {format_size(low)}"
    return f"between {format_size(low)} and {format_size(high)}"


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
    """Paths that were not timed, each with its reason."""
    records = [{"path": item.path, "reason": item.reason} for item in profile.excluded]
    columns = (Column("path", "path"), Column("reason", "reason"))
    return Section("excluded", columns, records, "Not measured")
