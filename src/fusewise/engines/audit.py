"""An engine's setting against a profile: where its fusion loses, what that costs, which cap cures.

Pure: a profile and a description of the engine in, one record out. Never imports torch, never
probes, and never repairs anything; the cap itself is decided by ``cap.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fusewise.engines.base import EngineSettings, Threshold
from fusewise.engines.cap import (
    CapDecision,
    Comparison,
    ExplicitCap,
    against_best,
    against_engine,
    decide_cap,
    safe_size,
)
from fusewise.engines.own_kernels import OwnKernels, own_kernels
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import Level
from fusewise.shape import format_size


@dataclass(frozen=True)
class Row:
    """One measured shape. ``delta_us`` is unfused − fused: above zero fusion wins."""

    hidden_size: int
    num_tokens: int
    message_bytes: int
    fused_path: str
    fused_us: float | None
    unfused_path: str
    unfused_us: float | None
    delta_us: float | None
    fused_today: bool
    verdict: str


@dataclass(frozen=True)
class LosingBand:
    """Sizes above ``above_bytes`` up to ``to_bytes`` that the engine fuses today and loses by."""

    hidden_size: int
    above_bytes: int
    to_bytes: int
    unfused_path: str
    worst_cost_us: float
    worst_at_bytes: int

    def __str__(self) -> str:
        return (
            f"{format_size(self.above_bytes)}–{format_size(self.to_bytes)} at hidden "
            f"{self.hidden_size}: fusing costs up to {self.worst_cost_us:.2f} µs per call "
            f"(at {format_size(self.worst_at_bytes)}, against {self.unfused_path})"
        )


@dataclass(frozen=True)
class HiddenCap:
    """The cap for one hidden size, and the largest number of tokens still fused."""

    hidden_size: int
    cap_bytes: int
    max_tokens: int
    level: Level


@dataclass(frozen=True)
class Audit:
    """What one engine's fusion setting costs on one node, and the cap that cures it.

    ``best_cap_bytes``: the largest measured size up to which the engine's fused kernel never
    loses to the best path the profile knows; None where nothing can be compared. ``own``: this
    package's kernels against what the engine runs; None where full mode has none to run.
    """

    version: str
    source: str
    threshold: Threshold | None
    cap: CapDecision
    best_cap_bytes: int | None
    own: OwnKernels | None
    rows: tuple[Row, ...]
    bands: tuple[LosingBand, ...]
    hidden_caps: tuple[HiddenCap, ...]
    flag: str | None
    environment: str | None
    notes: tuple[str, ...]

    def to_record(self) -> dict[str, Any]:
        """Plain data for JSON: every field by its name."""
        return asdict(self)

    def rows_record(self) -> list[dict[str, Any]]:
        """The measured shapes as rows of a table."""
        return [asdict(row) for row in self.rows]


def audit(
    profile: Profile,
    settings: EngineSettings,
    *,
    explicit: ExplicitCap | None = None,
    hidden_sizes: Iterable[int] = (),
    profile_level: Level = "argument",
    kernels: str | None = None,
) -> Audit:
    """Compares an engine's fusion with its own alternative on the node of a profile.

    Args:
        profile: the node's measurements.
        settings: the engine; its world size, GPU and dtype must be the profile's.
        explicit: a cap somebody set; it wins.
        hidden_sizes: whose smallest cap is the answer; by default all, and those the profile
            measured or names for token caps.
        profile_level: where the profile was found.
        kernels: the digest of this installation's sources of our kernels.

    Raises:
        StaleProfileError: the profile was measured at another world size, GPU or dtype.
    """
    columns = against_engine(profile, settings)
    decide = partial(decide_cap, profile, settings, explicit=explicit, profile_level=profile_level)
    asked = sorted(set(hidden_sizes))
    decided = [(h, decide(hidden_size=h)) for h in asked or _hidden_sizes(profile)]
    decision = min((d for _, d in decided), key=lambda d: d.cap_bytes or 0) if asked else decide()
    bests = [
        safe_size(column)
        for column in against_best(profile, settings).values()
        if any(comparison.outcome != "not measured" for comparison in column)
    ]
    cap = decision.cap_bytes
    return Audit(
        version=settings.version,
        source=profile.provenance.source,
        threshold=settings.threshold,
        cap=decision,
        best_cap_bytes=min(bests) if bests else None,
        own=None if explicit is not None else own_kernels(profile, settings, kernels),
        rows=tuple(_row(c, settings.cap_bytes(h)) for h, column in columns.items() for c in column),
        bands=tuple(
            band
            for h, column in columns.items()
            for band in _losing_bands(column, settings.cap_bytes(h) or 0)
        ),
        hidden_caps=tuple(
            HiddenCap(h, d.cap_bytes, settings.max_tokens(d.cap_bytes, h), d.level)
            for h, d in decided
            if d.cap_bytes is not None
        ),
        flag=None if cap is None else settings.flag(cap),
        environment=None if cap is None else settings.environment(cap),
        notes=tuple(_notes(profile, settings)),
    )


@dataclass(frozen=True)
class Explanation:
    """What one message runs on: today, and with the effective cap; and which level said so."""

    message_bytes: int
    today: str
    with_cap: str
    engine_cap_bytes: int | None
    cap_bytes: int | None
    level: Level
    origin: str
    why: str

    def to_record(self) -> dict[str, Any]:
        """Plain data for JSON: every field by its name."""
        return asdict(self)


def explain(
    settings: EngineSettings, decision: CapDecision, message_bytes: int, hidden_size: int
) -> Explanation:
    """The paths of one message size under the engine's own cap and under the decided one."""
    cap = decision.cap_bytes
    capped = settings.fused_choice if message_bytes <= (cap or 0) else settings.displaced_choice
    return Explanation(
        message_bytes,
        settings.today(message_bytes, hidden_size),
        capped(message_bytes, hidden_size),
        settings.cap_bytes(hidden_size),
        cap,
        decision.level,
        decision.origin,
        decision.why,
    )


def _hidden_sizes(profile: Profile) -> list[int]:
    measured = {sample.hidden_size for sample in profile.samples}
    return sorted(measured | {crossover.hidden_size for crossover in profile.crossovers})


def _row(comparison: Comparison, engine_cap_bytes: int | None) -> Row:
    shape = comparison.shape
    return Row(
        shape.hidden_size,
        shape.num_tokens,
        shape.message_bytes,
        comparison.fused,
        comparison.fused_us,
        comparison.rival,
        comparison.rival_us,
        None if comparison.delta is None else comparison.delta.median,
        engine_cap_bytes is not None and shape.message_bytes <= engine_cap_bytes,
        comparison.outcome,
    )


def _losing_bands(column: list[Comparison], engine_cap_bytes: int) -> list[LosingBand]:
    """Runs of neighbouring losses within what the engine fuses today."""
    bands: list[LosingBand] = []
    run: list[Comparison] = []
    before = 0
    for comparison in [c for c in column if c.outcome != "not measured"]:
        size = comparison.shape.message_bytes
        if comparison.outcome == "fusion loses" and size <= engine_cap_bytes:
            run.append(comparison)
            continue
        if run:
            bands.append(_band(run, before))
            run = []
        before = size
    return [*bands, _band(run, before)] if run else bands


def _band(run: list[Comparison], above_bytes: int) -> LosingBand:
    costs = {c: -c.delta.median for c in run if c.delta is not None}
    worst = max(costs, key=lambda c: costs[c])
    return LosingBand(
        run[0].shape.hidden_size,
        above_bytes,
        run[-1].shape.message_bytes,
        worst.rival,
        costs[worst],
        worst.shape.message_bytes,
    )


def _notes(profile: Profile, settings: EngineSettings) -> list[str]:
    notes = []
    if profile.fingerprint.multicast != settings.multicast:
        has = "with" if profile.fingerprint.multicast else "without"
        notes.append(f"The profile was measured {has} multicast; the question assumes otherwise.")
    notes += settings.notes({path.name for path in profile.paths})
    stated = [c.hidden_size for c in profile.crossovers]
    if stated:
        sizes = {format_size(c.message_bytes) for c in profile.crossovers}
        notes.append(
            f"The publication states the crossover at {', '.join(sorted(sizes))} for hidden "
            f"{', '.join(map(str, stated))}."
        )
    return notes
