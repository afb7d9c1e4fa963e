"""Profile → bands, crossovers, verdicts. A pure function; knows no torch and no engine.

The rules, in the order they apply at each measured size:

1. What is there stays: the walk starts with the baseline path and goes on with the path of the
   next smaller size.
2. A challenger takes over when the paired interval of its gain lies wholly above ``min_gain``
   of the incumbent's time. A tie changes nothing, so it never swaps a numerics class either.
3. Outside the measured range nothing is claimed: below the smallest measured size its path runs,
   as extrapolated; above the largest the baseline runs, as an engine default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from fusewise.operation import OPERATIONS, Op
from fusewise.profiles.bands import Band, Origin, Plan, Table, Verdict, baseline_path
from fusewise.profiles.intervals import Interval, median, paired_interval
from fusewise.profiles.schema import Profile, PublishedDelta, Sample
from fusewise.shape import Shape

MIN_GAIN = 0.02  # two percent: below the run-to-run spread seen on two H200s (benchmarks/results)

Row = Mapping[str, Sample]


@dataclass(frozen=True)
class Point:
    """What was decided at one measured shape."""

    shape: Shape
    medians_us: dict[str, float]
    chosen: str
    fastest: str
    verdict: Verdict
    gain: Interval | None  # best unfused minus best fused, µs; None where one side is missing
    note: str = ""


@dataclass(frozen=True)
class Crossover:
    """Where ``before`` stops and ``after`` starts to win: between two measured sizes."""

    hidden_size: int
    before: str
    after: str
    above_bytes: int
    below_bytes: int
    estimate_bytes: int


def derive(profile: Profile, min_gain: float = MIN_GAIN) -> Plan:
    """The plan of a profile.

    Args:
        profile: validated observations of one node.
        min_gain: the share of the incumbent's time a challenger must save, interval included.
    """
    tables = tuple(
        _table(profile, op, hidden_size, points)
        for op in OPERATIONS
        for hidden_size, points in decide_points(profile, op, min_gain).items()
    )
    source = f"{profile.provenance.origin}: {profile.provenance.source}"
    return Plan(profile.dtype, profile.baseline, tables, source)


def decide_points(
    profile: Profile, op: Op = "all_reduce_rms_norm", min_gain: float = MIN_GAIN
) -> dict[int, list[Point]]:
    """Every measured shape with its decision: hidden_size → points in ascending size."""
    fusable = OPERATIONS[op].fusable
    fused = {path.name for path in profile.paths if path.fused and fusable}
    decided: dict[int, list[Point]] = {}
    for hidden_size, rows in profile.points(op).items():
        incumbent = baseline_path(profile.baseline, op)
        points = []
        for shape, row in rows.items():
            point = _decide(shape, row, incumbent, fused, profile.deltas, min_gain)
            points.append(point)
            incumbent = point.chosen
        decided[hidden_size] = points
    return decided


def _decide(
    shape: Shape,
    row: Row,
    incumbent: str,
    fused: set[str],
    deltas: Iterable[PublishedDelta],
    min_gain: float,
) -> Point:
    medians = {name: median(sample.times_us) for name, sample in row.items()}
    fastest = min(medians, key=lambda name: (medians[name], name != incumbent, name))
    chosen, note = fastest, ""
    if incumbent in row and fastest != incumbent:
        gain = difference(shape, row, incumbent, fastest, deltas)
        if gain.low <= min_gain * medians[incumbent]:
            chosen = incumbent
            note = f"tie: {fastest} is {gain.median:+.2f} µs better, not clear of {min_gain:.0%}"
    gain_of_fusing = None
    sides = best(medians, fused), best(medians, set(medians) - fused)
    if sides[0] and sides[1]:
        gain_of_fusing = difference(shape, row, sides[1], sides[0], deltas)
    verdict = judge(gain_of_fusing, min(medians.values()), min_gain)
    return Point(shape, medians, chosen, fastest, verdict, gain_of_fusing, note)


def best(medians: Mapping[str, float], names: Iterable[str]) -> str | None:
    """The fastest of ``names`` among ``medians``; None when none was measured."""
    present = [name for name in names if name in medians]
    return min(present, key=lambda name: (medians[name], name)) if present else None


def difference(
    shape: Shape, row: Row, slower: str, faster: str, deltas: Iterable[PublishedDelta] = ()
) -> Interval:
    """Time of ``slower`` minus ``faster`` (µs) over paired rounds, or as a publication gives it."""
    for delta in deltas:
        if (delta.num_tokens, delta.hidden_size) == (shape.num_tokens, shape.hidden_size):
            if (delta.unfused, delta.fused) == (slower, faster):
                return Interval(delta.delta_us, delta.delta_us, delta.delta_us)
            if (delta.fused, delta.unfused) == (slower, faster):
                return Interval(-delta.delta_us, -delta.delta_us, -delta.delta_us)
    return paired_interval(row[slower].times_us, row[faster].times_us)


def judge(gain: Interval | None, fastest_us: float, min_gain: float = MIN_GAIN) -> Verdict:
    """``fuse`` or ``do not fuse`` only where the interval is clear of ± ``min_gain``."""
    if gain is None:
        return "inconclusive"
    threshold = min_gain * fastest_us
    if gain.low > threshold:
        return "fuse"
    return "do not fuse" if gain.high < -threshold else "inconclusive"


def _table(profile: Profile, op: Op, hidden_size: int, points: list[Point]) -> Table:
    origin: Origin = profile.provenance.origin
    runs: list[list[Point]] = []
    for point in points:
        if runs and runs[-1][0].chosen == point.chosen:
            runs[-1].append(point)
        else:
            runs.append([point])
    starts = [0] + [edge(before[-1], after[0]) for before, after in pairwise(runs)]
    validated_to = points[-1].shape.message_bytes
    ends = [*starts[1:], validated_to + 1]
    bands = [
        Band(start, end, run[0].chosen, _band_verdict(run), origin)
        for start, end, run in zip(starts, ends, runs, strict=True)
    ]
    smallest = points[0].shape
    if smallest.num_tokens > 1:  # there are smaller messages than were measured
        first = bands[0]
        below = replace(
            first, end_bytes=smallest.message_bytes, verdict="inconclusive", origin="extrapolated"
        )
        bands[:1] = [below, replace(first, min_bytes=smallest.message_bytes)]
    baseline = baseline_path(profile.baseline, op)
    bands.append(Band(validated_to + 1, None, baseline, "inconclusive", "engine default"))
    return Table(op, hidden_size, tuple(bands), points[0].shape.message_bytes, validated_to)


def _band_verdict(run: list[Point]) -> Verdict:
    """What its points say with one voice; ties among them are silent, contradictions are not."""
    verdicts = {point.verdict for point in run} - {"inconclusive"}
    return verdicts.pop() if len(verdicts) == 1 else "inconclusive"


def edge(before: Point, after: Point) -> int:
    """The first size of the later band: where the two paths' times cross, between two points.

    Interpolates the difference linearly over log2(size). Where the earlier path was already the
    slower one (kept as a tie) its band reaches to the next measured size.
    """
    low, high = before.shape.message_bytes, after.shape.message_bytes
    old, new = before.chosen, after.chosen
    try:
        lead_low = before.medians_us[new] - before.medians_us[old]
        lead_high = after.medians_us[old] - after.medians_us[new]
    except KeyError:  # a path not admitted on one side of the edge
        return high
    if lead_low < 0 or lead_high <= 0:
        return high
    share = lead_low / (lead_low + lead_high)
    estimate = 2 ** (math.log2(low) + share * (math.log2(high) - math.log2(low)))
    return min(high, max(low + 1, round(estimate)))


def crossovers(points: Mapping[int, list[Point]]) -> list[Crossover]:
    """Every change of winner, per hidden size."""
    return [
        Crossover(
            hidden_size,
            before.chosen,
            after.chosen,
            before.shape.message_bytes,
            after.shape.message_bytes,
            edge(before, after),
        )
        for hidden_size, column in points.items()
        for before, after in pairwise(column)
        if before.chosen != after.chosen
    ]


def constant_in_bytes(brackets: Mapping[int, tuple[int, int]]) -> bool | None:
    """Whether one size in bytes could be the crossover at every hidden size.

    Args:
        brackets: hidden_size → (largest size before, smallest size after) of its crossover.

    Returns:
        True when all brackets share a size, False when two exclude each other, None with fewer
        than two hidden sizes: then nobody can tell.
    """
    if len(brackets) < 2:
        return None
    return max(low for low, _ in brackets.values()) <= min(high for _, high in brackets.values())
