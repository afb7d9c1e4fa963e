"""One engine's cap: the largest size up to which its fused kernel never loses. Pure.

A measurement decides where it can: it must hold both the engine's fused kernel and the very
all-reduce this engine would run instead. Where it does not, the engine's rule does.
An explicit value wins over both. Nothing here reads a file or an environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fusewise.engines.base import EngineSettings
from fusewise.errors import InputError, StaleProfileError
from fusewise.operation import unfused_path
from fusewise.profiles.bands import Origin
from fusewise.profiles.intervals import Interval, median
from fusewise.profiles.plan import best, difference, judge
from fusewise.profiles.schema import Profile, Sample
from fusewise.profiles.store import Level
from fusewise.shape import Shape, format_size

Outcome = Literal["fusion wins", "tie", "fusion loses", "not measured"]


@dataclass(frozen=True)
class Comparison:
    """The engine's fused kernel against one rival at one measured shape.

    ``delta`` is rival minus fused, µs: above zero fusing is faster. Times and delta are None,
    and the outcome says so, where one side was not measured.
    """

    shape: Shape
    fused: str
    rival: str
    fused_us: float | None
    rival_us: float | None
    delta: Interval | None
    outcome: Outcome


@dataclass(frozen=True)
class ExplicitCap:
    """A cap somebody asked for, and where."""

    cap_bytes: int
    level: Level = "argument"

    def __post_init__(self) -> None:
        if self.cap_bytes < 0:
            raise InputError("cap out of range", expected=">= 0 bytes", got=str(self.cap_bytes))


@dataclass(frozen=True)
class CapDecision:
    """The effective cap, the level that answered, and why. None: the engine does not fuse."""

    cap_bytes: int | None
    level: Level
    origin: Origin | Literal["explicit"]
    why: str


def decide_cap(
    profile: Profile | None,
    settings: EngineSettings,
    *,
    explicit: ExplicitCap | None = None,
    profile_level: Level = "argument",
    hidden_size: int | None = None,
) -> CapDecision:
    """The cap for this engine on this node.

    Args:
        profile: what was measured on such a node, or None.
        settings: the engine.
        explicit: wins over everything.
        profile_level: where the profile was found, for the answer.
        hidden_size: decide by the nearest measured hidden size; None: the smallest cap of all.

    Raises:
        StaleProfileError: the profile was measured at another world size, GPU or dtype.
    """
    if explicit is not None:
        cap_bytes, why = explicit.cap_bytes, "set explicitly"
        own = settings.cap_bytes(hidden_size)
        if settings.only_lowered and hidden_size and own is not None and own < cap_bytes:
            cap_bytes, why = own, "set explicitly, beyond what the engine fuses"
        return CapDecision(cap_bytes, explicit.level, "explicit", why)
    if profile is not None and settings.threshold is not None:
        measured = _measured_cap(profile, settings, profile_level, hidden_size)
        if measured is not None:
            return measured
    rule = settings.rule(hidden_size)
    if rule.lowered:
        return CapDecision(rule.cap_bytes, "rule", "rule", rule.why)
    return CapDecision(rule.cap_bytes, "engine default", "engine default", rule.why)


def _measured_cap(
    profile: Profile, settings: EngineSettings, level: Level, hidden_size: int | None
) -> CapDecision | None:
    columns = against_engine(profile, settings)
    if hidden_size is not None:
        columns = {h: columns[h] for h in nearest(columns, hidden_size)}
    decided = [
        answer
        for measured_at, column in columns.items()
        if (answer := _column_cap(column, settings, hidden_size or measured_at))
    ]
    if not decided:
        return None
    cap, why = min(decided)
    # Hidden sizes without an answer have the rule's cap: what was measured counts below it. Not if
    # its smallest size loses: that says nothing of smaller ones, and would switch fusion off.
    rule = settings.rule(hidden_size).cap_bytes
    if len(decided) < len(columns) and (cap == 0 or (rule is not None and cap >= rule)):
        return None
    why += _given_up_text(columns, settings, cap)
    return CapDecision(cap, level, profile.provenance.origin, why)


def _given_up_text(
    columns: Mapping[int, list[Comparison]], settings: EngineSettings, cap_bytes: int
) -> str:
    """Where fusing would win above the cap, within what the engine fuses; empty if nowhere."""
    gains = {
        comparison: comparison.delta.median
        for hidden_size, column in columns.items()
        for comparison in column
        if comparison.outcome == "fusion wins" and comparison.delta is not None
        if cap_bytes < comparison.shape.message_bytes <= (settings.cap_bytes(hidden_size) or 0)
    }
    if not gains:
        return ""
    most = max(gains, key=lambda comparison: gains[comparison])
    return (
        f"; the cap gives up to {gains[most]:.2f} µs away where fusing wins above it (at "
        f"{format_size(most.shape.message_bytes)}, hidden {most.shape.hidden_size})"
    )


def _column_cap(
    column: list[Comparison], settings: EngineSettings, hidden_size: int
) -> tuple[int, str] | None:
    """The cap of one hidden size, or None where the samples do not settle it.

    A loss settles it wherever it is; that fusing never loses, only samples without a gap up to the
    last whole token below the engine's cap.
    """
    own = settings.cap_bytes(hidden_size) or 0
    if settings.only_lowered:
        beyond = [c.shape.message_bytes for c in column if c.shape.message_bytes >= own]
        column = [c for c in column if c.shape.message_bytes <= min(beyond, default=own)]
    sizes = [c.shape.message_bytes for c in column]
    loss = first_loss(column)
    if loss is not None:
        cap = max((size for size in sizes if size < loss.shape.message_bytes), default=0)
        why = _loss_text(loss)
    elif any(c.outcome == "not measured" for c in column) or not _reaches(column, own):
        return None
    else:
        cap = max(own, *sizes)
        why = f"fusing never loses up to {format_size(cap)}, as far as was measured"
    return (min(cap, own) if settings.only_lowered else cap), why


def _reaches(column: list[Comparison], cap_bytes: int) -> bool:
    """Whether the next token more would be beyond the cap."""
    largest = max((c.shape.message_bytes + c.shape.row_bytes for c in column), default=0)
    return largest > cap_bytes


def _loss_text(loss: Comparison) -> str:
    assert loss.delta is not None
    return (
        f"at {format_size(loss.shape.message_bytes)} (hidden {loss.shape.hidden_size}) fusing "
        f"costs {-loss.delta.median:.2f} µs against {loss.rival}"
    )


def first_loss(column: Iterable[Comparison]) -> Comparison | None:
    """The smallest measured size at which fusing loses."""
    return next((c for c in column if c.outcome == "fusion loses"), None)


def safe_size(column: list[Comparison]) -> int:
    """The largest measured size below the first loss, in bytes; 0 when the smallest loses."""
    loss = first_loss(column)
    end = math.inf if loss is None else loss.shape.message_bytes
    sizes = [c.shape.message_bytes for c in column if c.outcome != "not measured"]
    return max((size for size in sizes if size < end), default=0)


def nearest(hidden_sizes: Iterable[int], hidden_size: int) -> list[int]:
    """The measured hidden size nearest by ratio, as a list of one; empty where there is none."""
    return sorted(hidden_sizes, key=lambda h: abs(math.log(h / hidden_size)))[:1]


def against_engine(profile: Profile, settings: EngineSettings) -> dict[int, list[Comparison]]:
    """Fused against the engine's own unfused choice: hidden_size → comparisons by size."""
    _check_same_node(profile, settings)
    return {
        hidden_size: [
            _compare(
                profile,
                shape,
                row,
                settings.fused_choice(shape.message_bytes, hidden_size),
                settings.displaced_choice(shape.message_bytes, hidden_size),
            )
            for shape, row in rows.items()
        ]
        for hidden_size, rows in profile.points().items()
    }


def against_best(profile: Profile, settings: EngineSettings) -> dict[int, list[Comparison]]:
    """Fused against the fastest other path of the profile: hidden_size → comparisons by size.

    A path that needs multicast does not count where the settings say there is none.
    """
    _check_same_node(profile, settings)
    columns: dict[int, list[Comparison]] = {}
    for hidden_size, rows in profile.points().items():
        columns[hidden_size] = []
        for shape, row in rows.items():
            fused = settings.fused_choice(shape.message_bytes, hidden_size)
            medians = {name: median(sample.times_us) for name, sample in row.items()}
            impossible = set() if settings.multicast else {unfused_path("multimem")}
            rival = best(medians, set(medians) - {fused} - impossible)
            if rival is not None:
                columns[hidden_size].append(_compare(profile, shape, row, fused, rival))
    return columns


def _compare(
    profile: Profile, shape: Shape, row: Mapping[str, Sample], fused: str, rival: str
) -> Comparison:
    times = {name: median(row[name].times_us) for name in (fused, rival) if name in row}
    if len(times) < 2:
        return Comparison(
            shape, fused, rival, times.get(fused), times.get(rival), None, "not measured"
        )
    delta = difference(shape, row, rival, fused, profile.deltas)
    outcome = _outcome(delta, min(times.values()))
    return Comparison(shape, fused, rival, times[fused], times[rival], delta, outcome)


def _outcome(delta: Interval, fastest_us: float) -> Outcome:
    """A tie does not lose; a number that came without its spread loses by its sign."""
    judged = judge(delta, fastest_us)
    if judged == "do not fuse" or (delta.low == delta.high and delta.median < 0):
        return "fusion loses"
    return "fusion wins" if judged == "fuse" else "tie"


def _check_same_node(profile: Profile, settings: EngineSettings) -> None:
    mark = profile.fingerprint
    pairs = {
        "device_type": (mark.device_type, "cuda"),
        "sm": (mark.sm, settings.sm),
        "world_size": (mark.world_size, settings.world_size),
        "nodes": (mark.nodes, 1),
        "dtype": (profile.dtype, settings.dtype),
    }
    other = [
        f"{name} {mine} in the profile, {asked} asked"
        for name, (mine, asked) in pairs.items()
        if mine != asked
    ]
    if other:
        raise StaleProfileError(
            "the profile does not describe this node",
            got="; ".join(other),
            hint="Run `fusewise tune` on the node and dtype in question.",
        )
