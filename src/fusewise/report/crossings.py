"""Where the winner changes, as records, and whether that is constant in bytes. Pure conversions.

The crossovers themselves are ``fusewise.profiles.plan``'s; here they are only written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusewise.operation import Op
from fusewise.profiles.plan import (
    MIN_GAIN,
    Crossover,
    Point,
    constant_in_bytes,
    crossovers,
    decide_points,
)
from fusewise.profiles.schema import Profile
from fusewise.report.table import Column, Section
from fusewise.shape import format_size

FUSABLE: Op = "all_reduce_rms_norm"
OPS: tuple[Op, ...] = (FUSABLE, "all_reduce")
NO_LIMIT = 2**62  # above every size a profile can hold


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
) -> dict[str, Any]:
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
    """hidden_size → the sizes between which fusing stops winning, for the last such change.

    A hidden size whose largest measured message is still fused has its change above that size, up
    to ``NO_LIMIT``; one where no fused path is chosen has it between 0 and the smallest size. A
    published crossover is its own bracket, unless samples tell more.
    """
    fused = {path.name for path in profile.paths if path.fused}
    brackets = {c.hidden_size: (c.message_bytes, c.message_bytes) for c in profile.crossovers}
    for hidden_size, column in points.items():
        low, high = 0, column[0].shape.message_bytes
        for i, point in enumerate(column):
            if point.chosen in fused:
                low = point.shape.message_bytes
                high = column[i + 1].shape.message_bytes if i + 1 < len(column) else NO_LIMIT
        brackets[hidden_size] = (low, high)
    return brackets


def constancy(brackets: Mapping[int, tuple[int, int]]) -> str:
    """The sentence on where fusing stops winning, and whether one size in bytes says it for all.

    Args:
        brackets: of ``fusion_brackets``.
    """
    if not brackets:
        return f"No measurement of {FUSABLE}."
    if all(low == 0 for low, _ in brackets.values()):
        return "No fused path is chosen at any measured size."
    if all(high == NO_LIMIT for _, high in brackets.values()):
        return "A fused path is still chosen at the largest measured size."
    places = "; ".join(
        f"{_place(low, high)} at hidden {hidden_size}"
        for hidden_size, (low, high) in sorted(brackets.items())
    )
    verdict = constant_in_bytes(brackets)
    if verdict is None:
        answer = "unknown: one hidden size measured"
    elif verdict:
        lowest, highest = zip(*brackets.values(), strict=True)
        answer = f"possible, {_place(max(lowest), min(highest))}"
    else:
        answer = "no"
    return f"Fusing stops winning {places}. Constant in bytes: {answer}."


def _place(low: int, high: int) -> str:
    if low == 0:
        return f"below {format_size(high)}"
    if high == NO_LIMIT:
        return f"above {format_size(low)}"
    if low == high:
        return f"at {format_size(low)}"
    return f"between {format_size(low)} and {format_size(high)}"
