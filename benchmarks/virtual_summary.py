"""Tables and targets of a run of virtual_node.py. Pure.

A row is one arm at one point in one pattern: ``{"pattern", "world_size", "hidden_size",
"num_tokens", "message_bytes", "arm", "time_us", "ratio"}``; ``ratio`` is the median over rounds of
the arm's time over FlashInfer's fused one-shot with its completion at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from native_summary import KIB, MIB, geometric_mean

FLASHINFER = "flashinfer.one_shot"
ONE_SHOT, TWO_SHOT, EARLY = "native.one_shot", "native.two_shot", ":early"
EXCHANGE = "exchange"  # the floor: one vector per lane of one warp, there and back
ALL = EXCHANGE + ":all"  # or all of the message, by as many warps as ours has
# A kernel is compared with the floors that let the next begin where it does.
OVER_FLOOR = (
    (ONE_SHOT + EARLY, EXCHANGE),
    (ALL, EXCHANGE),
    (ONE_SHOT + EARLY, ALL),
    (ONE_SHOT, EXCHANGE + ":late"),
    (ALL + ":late", EXCHANGE + ":late"),
    (ONE_SHOT, ALL + ":late"),
)
MEAN_OVER = (2048, 4096, 7168)
SMALL, LARGE = (8 * KIB, 64 * KIB), (128 * KIB, MIB)
# pattern, ranks, arm, sizes, the most that the geometric mean may be of FlashInfer's
TARGETS = (
    ("in_place", 2, ONE_SHOT, SMALL, 0.65),
    ("in_place", 2, ONE_SHOT, LARGE, 0.65),
    ("chain", 2, ONE_SHOT, SMALL, 0.58),
    ("chain", 2, ONE_SHOT, LARGE, 0.60),
    ("chain", 4, ONE_SHOT, SMALL, 0.65),
    ("chain", 4, ONE_SHOT, LARGE, 0.65),
    ("chain", 8, ONE_SHOT, SMALL, 0.70),
    ("in_place", 4, ONE_SHOT, SMALL, 0.65),
    ("in_place", 8, ONE_SHOT, SMALL, 0.70),
)
MOST_AT_A_POINT = 0.75  # two ranks
MOST_OF_FLOOR = 1.3  # chain, two ranks, 8 KiB
MOST_FOR_TWO_TRIPS_US = 1.2  # two-shot over one-shot up to 32 KiB

Row = dict[str, Any]


def tables(rows: Sequence[Row], width: int = 24) -> Iterator[str]:
    """µs per arm and point, then the geometric mean of ratios up to and above 64 KiB, the worst."""
    for pattern, world in sorted({(r["pattern"], r["world_size"]) for r in rows}):
        part = [r for r in rows if (r["pattern"], r["world_size"]) == (pattern, world)]
        points = sorted({(r["hidden_size"], r["num_tokens"]) for r in part})
        yield f"\n{pattern}, {world} ranks, µs"
        yield " " * width + "".join(f"{f'{h}x{t}':>9}" for h, t in points) + "  ≤64K >64K  max"
        for arm in dict.fromkeys(r["arm"] for r in part):
            at = {(r["hidden_size"], r["num_tokens"]): r for r in part if r["arm"] == arm}
            cells = "".join(f"{at[p]['time_us']:9.2f}" if p in at else " " * 9 for p in points)
            ratios = [(r["message_bytes"], r["ratio"]) for r in at.values() if "ratio" in r]
            small = geometric_mean([x for size, x in ratios if size <= SMALL[1] and x > 0])
            large = geometric_mean([x for size, x in ratios if size > SMALL[1] and x > 0])
            most = max((x for _, x in ratios), default=float("nan"))
            yield f"{arm:{width}.{width}}{cells}  {small:.2f} {large:.2f} {most:.2f}"


def of_arm(rows: Iterable[Row], pattern: str, world_size: int, arm: str) -> list[Row]:
    """An arm's rows in one pattern and group, ascending by size."""
    mine = (pattern, world_size, arm)
    found = [r for r in rows if (r["pattern"], r["world_size"], r["arm"]) == mine]
    return sorted(found, key=lambda r: (r["message_bytes"], r["hidden_size"]))


def _close_to(size: int, bounds: tuple[int, int]) -> bool:
    """Within bounds, give or take the eighth by which whole tokens miss a size."""
    return bounds[0] * 7 / 8 <= size <= bounds[1] * 9 / 8


def targets(rows: Sequence[Row]) -> Iterator[str]:
    """One line per target: what was asked, what was found."""
    for pattern, world, arm, bounds, most in TARGETS:
        found = [
            r for r in of_arm(rows, pattern, world, arm) if _close_to(r["message_bytes"], bounds)
        ]
        ratios = [r["ratio"] for r in found if r["hidden_size"] in MEAN_OVER and "ratio" in r]
        name = f"{pattern}, {world} ranks, {bounds[0] // KIB}-{bounds[1] // KIB} KiB, {arm}"
        yield _line(f"{name} of {FLASHINFER}", geometric_mean(ratios), most)
    for pattern in ("in_place", "chain"):
        points = [r for r in of_arm(rows, pattern, 2, ONE_SHOT) if r["message_bytes"] >= 7 * KIB]
        worst = max((r["ratio"] for r in points if "ratio" in r), default=float("nan"))
        yield _line(f"{pattern}, 2 ranks, worst point", worst, MOST_AT_A_POINT)
    mine = {_at(r): r["time_us"] for r in of_arm(rows, "chain", 2, ONE_SHOT)}
    theirs = {_at(r): r["time_us"] for r in of_arm(rows, "chain", 2, FLASHINFER + EARLY)}
    above = max((mine[p] / theirs[p] for p in mine.keys() & theirs.keys()), default=float("nan"))
    yield _line("chain, 2 ranks, worst of FlashInfer's early trigger", above, 1.0)
    for arm, nearest in OVER_FLOOR:
        mine = {_at(r): r["time_us"] for r in of_arm(rows, "chain", 2, arm)}
        floor = {_at(r): r["time_us"] for r in of_arm(rows, "chain", 2, nearest)}
        for point in sorted(p for p in mine.keys() & floor.keys() if p[2] == 8 * KIB):
            name = f"chain, 2 ranks, {point[1]} x {point[0]}, {arm} of {nearest}"
            yield _line(f"{name}, {floor[point]:.2f} µs", mine[point] / floor[point], MOST_OF_FLOOR)
    for world in (4, 8):
        for pattern in ("chain", "in_place"):
            one = {_at(r): r["time_us"] for r in of_arm(rows, pattern, world, ONE_SHOT)}
            two = {_at(r): r["time_us"] for r in of_arm(rows, pattern, world, TWO_SHOT)}
            extra = [two[p] - one[p] for p in one.keys() & two.keys() if p[2] <= 32 * KIB]
            name = f"{pattern}, {world} ranks, two-shot over one-shot, µs, up to 32 KiB"
            yield _line(name, max(extra, default=float("nan")), MOST_FOR_TWO_TRIPS_US)


def _at(row: Row) -> tuple[int, int, int]:
    return row["hidden_size"], row["num_tokens"], row["message_bytes"]


def _line(name: str, found: float, most: float) -> str:
    verdict = "not measured" if math.isnan(found) else "yes" if found <= most else "NO"
    return f"{name:90} {found:6.2f} (≤ {most:.2f}) {verdict}"
