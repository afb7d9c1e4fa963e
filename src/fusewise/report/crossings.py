"""Where the winner changes, as records, and whether that is constant in bytes. Pure conversions.

The crossovers themselves are ``fusewise.profiles.plan``'s; here they are only written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusewise.operation import Op
from fusewise.profiles.plan import (
    Crossover,
    Point,
    constant_in_bytes,
    crossovers,
    decide_points,
)
from fusewise.profiles.schema import Profile, PublishedCrossover
from fusewise.report.table import Column, Section
from fusewise.shape import format_size

FUSABLE: Op = "all_reduce_rms_norm"
OPS: tuple[Op, ...] = (FUSABLE, "all_reduce")
NO_LIMIT = 2**62  # above every size a profile can hold


def crossings(profile: Profile, op: Op = FUSABLE) -> Section:
    """Where the winner changes, and in a note whether that is constant in bytes.

    ``above_bytes`` and ``below_bytes`` are the measured sizes on both sides, ``estimate_bytes``
    the interpolated place between them; a published crossover has all three equal.
    """
    decided = decide_points(profile, op)
    shown = [_crossing(c) for c in crossovers(decided)]
    notes: tuple[str, ...] = ()
    if op == FUSABLE:
        shown += [_stated(c) for c in profile.crossovers]
        notes = (constancy(fusion_brackets(profile, decided)),)
    data = [
        {"dtype": profile.dtype, "op": op} | {k: v for k, v in row.items() if k not in _SHOWN}
        for row in shown
    ]
    return Section("crossovers", _COLUMNS, shown, f"Crossovers: {op}", notes, data)


_COLUMNS = (
    Column("hidden_size", "hidden", align="right"),
    Column("before", "up to it"),
    Column("after", "above it"),
    Column("between", "between"),
    Column("near", "near", align="right"),
)
_SHOWN = ("between", "near")  # for people; machines have the three sizes


def _crossing(c: Crossover) -> dict[str, Any]:
    return {
        "hidden_size": c.hidden_size,
        "before": c.before,
        "after": c.after,
        "above_bytes": c.above_bytes,
        "below_bytes": c.below_bytes,
        "estimate_bytes": c.estimate_bytes,
        "between": f"{format_size(c.above_bytes)} and {format_size(c.below_bytes)}",
        "near": rounded_size(c.estimate_bytes),
    }


def _stated(c: PublishedCrossover) -> dict[str, Any]:
    sizes = dict.fromkeys(("above_bytes", "below_bytes", "estimate_bytes"), c.message_bytes)
    return {
        "hidden_size": c.hidden_size,
        "before": None,
        "after": None,
        **sizes,
        "between": "as published",
        "near": rounded_size(c.message_bytes),
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
