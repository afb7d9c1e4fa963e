"""Two profiles, of two nodes or two dates: where their times and their decisions differ. Pure.

Rounds of two runs are not paired, so a difference counts where the interval of the ratio of the
medians is clear of ``MIN_GAIN``: the same bound below which a plan changes nothing. A time that was
published without its rounds has no interval, and nobody can tell noise from change there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusewise.errors import InputError
from fusewise.operation import OPERATIONS, Op
from fusewise.profiles.intervals import Interval, median, ratio_interval
from fusewise.profiles.plan import MIN_GAIN, decide_points, difference
from fusewise.profiles.schema import Profile, Sample
from fusewise.shape import Shape

Verdict = Literal["faster", "slower", "same", "no spread"]
Clear = Literal["clear", "noise", "no spread", "not measured"]


@dataclass(frozen=True)
class Change:
    """One path at one shape in both: ``ratio`` is the second's time over the first's."""

    op: Op
    path: str
    shape: Shape
    first_us: float
    second_us: float
    ratio: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Disagreement:
    """One shape at which the two plans run different paths.

    ``cost``: what the first one's path costs where the second was measured, µs over paired rounds;
    None where it was not measured there. ``clear``: whether that is beyond noise.
    """

    op: Op
    shape: Shape
    first_path: str
    second_path: str
    cost: Interval | None
    clear: Clear


@dataclass(frozen=True)
class Comparison:
    """All that both profiles measured; ``first_only`` and ``second_only`` count what one did."""

    changes: tuple[Change, ...]
    disagreements: tuple[Disagreement, ...]
    first_only: int
    second_only: int


def compare(first: Profile, second: Profile) -> Comparison:
    """Every sample that both have, and every shape at which they decide differently.

    Raises:
        InputError: the two are of different dtypes, so equal shapes are different messages.
    """
    if first.dtype != second.dtype:
        raise InputError(
            "profiles of two dtypes do not compare",
            expected=f"two of {first.dtype}",
            got=second.dtype,
        )
    ours, theirs = _samples(first), _samples(second)
    common = [key for key in ours if key in theirs]
    return Comparison(
        tuple(_change(ours[key], theirs[key], first) for key in common),
        tuple(found for op in OPERATIONS for found in _disagreements(first, second, op)),
        len(ours) - len(common),
        len(theirs) - len(common),
    )


def _samples(profile: Profile) -> dict[tuple[str, int, int, str], Sample]:
    ordered = sorted(profile.samples, key=lambda s: (s.op, s.hidden_size, s.num_tokens))
    return {(s.op, s.hidden_size, s.num_tokens, s.path): s for s in ordered}


def _change(first: Sample, second: Sample, profile: Profile) -> Change:
    ratio = ratio_interval(first.times_us, second.times_us)
    verdict: Verdict = "same"
    if min(len(first.times_us), len(second.times_us)) < 2:
        verdict = "no spread"
    elif ratio.low > 1 + MIN_GAIN:
        verdict = "slower"
    elif ratio.high < 1 - MIN_GAIN:
        verdict = "faster"
    shape = Shape(first.num_tokens, first.hidden_size, profile.dtype)
    times = median(first.times_us), median(second.times_us)
    return Change(first.op, first.path, shape, *times, ratio, verdict)


def _disagreements(first: Profile, second: Profile, op: Op) -> list[Disagreement]:
    rows = {shape: row for column in second.points(op).values() for shape, row in column.items()}
    chosen = [
        {point.shape: point.chosen for column in decided.values() for point in column}
        for decided in (decide_points(first, op), decide_points(second, op))
    ]
    return [
        _disagreement(op, shape, path, chosen[1][shape], rows[shape], second)
        for shape, path in chosen[0].items()
        if shape in chosen[1] and path != chosen[1][shape]
    ]


def _disagreement(
    op: Op,
    shape: Shape,
    ours: str,
    theirs: str,
    row: dict[str, Sample],
    second: Profile,
) -> Disagreement:
    if ours not in row or theirs not in row:
        return Disagreement(op, shape, ours, theirs, None, "not measured")
    cost = difference(shape, row, ours, theirs, second.deltas)
    clear: Clear = "noise"
    if len(row[ours].times_us) < 2:
        clear = "no spread"
    elif cost.low > MIN_GAIN * median(row[theirs].times_us):
        clear = "clear"
    return Disagreement(op, shape, ours, theirs, cost, clear)
