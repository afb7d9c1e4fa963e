"""The plans that a decode run compares, from one profile. Pure; knows no torch.

``unfused``: the engine's own all-reduces, never fused. ``engine-cap``: its fused kernel up to its
own cap. ``effective-cap``: the same kernel up to the cap that this profile or the rule gives.
``measured``: what the profile says, path by path. ``measured without X``: the same profile as if X
had never been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusewise.backends.registry import select
from fusewise.engines.base import EngineSettings
from fusewise.engines.cap import decide_cap
from fusewise.errors import InputError
from fusewise.operation import Op, all_reduce_of
from fusewise.profiles.bands import Band, Origin, Plan, Table
from fusewise.profiles.plan import decide_points, derive
from fusewise.profiles.schema import Profile
from fusewise.shape import format_size

# Where no engine has a table, as on CPU ranks: vLLM's cap for two Hopper GPUs.
DEFAULT_CAP_BYTES = 64 * 2**20
_STEP_BYTES = 16  # every message is a whole number of vectors
_LARGEST_BYTES = 2**32

Choose = Callable[[int], str]


@dataclass(frozen=True)
class Arm:
    """One plan of the comparison, and what it stands for."""

    name: str
    plan: Plan
    note: str


def arms_for(
    profile: Profile,
    hidden_size: int,
    engine: EngineSettings | None,
    *,
    engine_cap_bytes: int | None = None,
    without: Sequence[str] = (),
) -> list[Arm]:
    """The arms in the order in which they are shown, ``unfused`` first.

    Args:
        profile: of the node that decodes.
        hidden_size: of the model.
        engine: whose tables make the first arms; None where there is none, as on CPUs.
        engine_cap_bytes: instead of the engine's own cap.
        without: a provider or backend per further ``measured`` arm.

    Raises:
        InputError: a name in ``without`` that no path of the profile has.
    """
    unfused, fused = _choices(profile, engine, hidden_size)
    known = engine.cap_bytes(hidden_size) if engine is not None else None
    today = engine_cap_bytes or known or DEFAULT_CAP_BYTES
    arms = [Arm("unfused", _plan(profile, hidden_size, unfused, unfused, "unfused"), "never fused")]
    if fused is not None:
        effective, why = _effective_cap(profile, engine, hidden_size)
        caps = (("engine-cap", today, "the engine's cap"), ("effective-cap", effective, why))
        for name, cap_bytes, note in caps:
            choose = _capped(fused, unfused, cap_bytes)
            plan = _plan(profile, hidden_size, choose, unfused, name)
            arms.append(Arm(name, plan, f"fused up to {format_size(cap_bytes)}: {note}"))
    arms.append(Arm("measured", derive(profile), profile.provenance.source))
    for name in without:
        smaller = profile_without(profile, [name])
        arms.append(Arm(f"measured without {name}", derive(smaller), f"as if without {name}"))
    return arms


def profile_without(profile: Profile, names: Sequence[str]) -> Profile:
    """The profile as if the paths of some backends or providers had never been measured.

    Raises:
        InputError: no path is one of theirs, or no path would be left.
    """
    smaller = profile.without(select(names))
    if smaller is None or smaller is profile:
        raise InputError(
            "cannot leave that out of the profile",
            expected=f"some but not all of {', '.join(path.name for path in profile.paths)}",
            got=", ".join(names),
        )
    return smaller


def _choices(
    profile: Profile, engine: EngineSettings | None, hidden_size: int
) -> tuple[Choose, Choose | None]:
    """Which unfused and which fused path runs at a size; only paths that were measured."""
    measured = {path.name for path in profile.paths}
    fused_paths = [path.name for path in profile.paths if path.fused]
    if engine is None:
        return lambda _: profile.baseline, (lambda _: fused_paths[0]) if fused_paths else None

    def unfused(message_bytes: int) -> str:
        path = engine.displaced_choice(message_bytes, hidden_size)
        return path if path in measured else profile.baseline

    def fused(message_bytes: int) -> str:
        path = engine.fused_choice(message_bytes, hidden_size)
        return path if path in measured else "flashinfer.one_shot"

    return unfused, fused if "flashinfer.one_shot" in measured else None


def _capped(fused: Choose, unfused: Choose, cap_bytes: int) -> Choose:
    return lambda size: fused(size) if size <= cap_bytes else unfused(size)


def _effective_cap(
    profile: Profile, engine: EngineSettings | None, hidden_size: int
) -> tuple[int, str]:
    """The largest size up to which fusing never loses, and who says so."""
    if engine is not None:
        decision = decide_cap(profile, engine, hidden_size=hidden_size)
        return decision.cap_bytes or 0, decision.why
    columns = decide_points(profile)
    nearest = min(columns, key=lambda h: abs(h - hidden_size))
    safe = 0
    for point in columns[nearest]:
        if point.verdict == "do not fuse":
            break
        safe = point.shape.message_bytes
    return safe, "fusing never loses below, as measured"


def _plan(profile: Profile, hidden_size: int, choose: Choose, unfused: Choose, source: str) -> Plan:
    bare: Choose = lambda size: all_reduce_of(unfused(size))  # noqa: E731
    tables = (
        _table("all_reduce_rms_norm", hidden_size, choose),
        _table("all_reduce", hidden_size, bare),
    )
    return Plan(profile.dtype, profile.baseline, tables, source)


def _table(op: Op, hidden_size: int, choose: Choose) -> Table:
    """Bands of a rule given as a function: its changes are found by doubling, then bisecting."""
    origin: Origin = "engine default"
    starts = [0]
    low = 0
    while low < _LARGEST_BYTES:
        high = max(_STEP_BYTES, 2 * low)
        while choose(low) != choose(high):
            edge = _first_change(choose, low, high)
            starts.append(edge)
            low = edge
        low = high
    ends = [*starts[1:], None]
    bands = tuple(
        Band(start, end, choose(start), "inconclusive", origin)
        for start, end in zip(starts, ends, strict=True)
    )
    return Table(op, hidden_size, bands, 0, 0)


def _first_change(choose: Choose, low: int, high: int) -> int:
    """The smallest size above ``low``, in whole steps, at which the choice differs from there."""
    before = choose(low)
    while high - low > _STEP_BYTES:
        middle = (low + high) // 2 // _STEP_BYTES * _STEP_BYTES
        low, high = (middle, high) if choose(middle) == before else (low, middle)
    return high
