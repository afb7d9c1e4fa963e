"""An engine's setting against a profile: where its fusion loses, what that costs, which cap cures.

Pure: a profile and a description of the engine in, one record out. Never imports torch, never
probes, and never repairs anything; the cap itself is decided by ``cap.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fusewise.engines.cap import (
    CapDecision,
    Comparison,
    ExplicitCap,
    against_best,
    against_engine,
    decide_cap,
    safe_size,
)
from fusewise.engines.vllm.dispatch import (
    VllmSettings,
    displaced_choice,
    engine_cap,
    flashinfer_active,
    fused_backend,
    fused_choice,
    unfused_choice,
    vllm_environment,
    vllm_flag,
)
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import Level
from fusewise.shape import format_size, tokens_at


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
    """What one vLLM's fusion setting costs on one node, and the cap that cures it.

    ``best_cap_bytes``: the largest measured size up to which the engine's fused kernel never
    loses to the best path the profile knows; None where nothing can be compared.
    """

    version: str
    source: str
    engine_cap_bytes: int | None
    cap: CapDecision
    best_cap_bytes: int | None
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
    settings: VllmSettings,
    *,
    explicit: ExplicitCap | None = None,
    hidden_sizes: Iterable[int] = (),
    profile_level: Level = "argument",
) -> Audit:
    """Compares a vLLM's fusion with its own alternative on the node of a profile.

    Args:
        profile: the node's measurements.
        settings: the vLLM; its world size, GPU and dtype must be the profile's.
        explicit: a cap somebody set; it wins.
        hidden_sizes: for token caps; by default those the profile measured or names.
        profile_level: where the profile was found.

    Raises:
        StaleProfileError: the profile was measured at another world size, GPU or dtype.
    """
    today = engine_cap(settings)
    columns = against_engine(profile, settings)
    decide = partial(decide_cap, profile, settings, explicit=explicit, profile_level=profile_level)
    decision = decide()
    named = sorted(set(hidden_sizes)) or _hidden_sizes(profile)
    decided = [(hidden_size, decide(hidden_size=hidden_size)) for hidden_size in named]
    bests = [safe_size(column) for column in against_best(profile, settings).values() if column]
    cap = decision.cap_bytes
    return Audit(
        version=settings.version,
        source=profile.provenance.source,
        engine_cap_bytes=today,
        cap=decision,
        best_cap_bytes=min(bests) if bests else None,
        rows=tuple(_row(c, today) for column in columns.values() for c in column),
        bands=tuple(
            band for column in columns.values() for band in _losing_bands(column, today or 0)
        ),
        hidden_caps=tuple(
            HiddenCap(h, d.cap_bytes, tokens_at(d.cap_bytes, h, settings.dtype), d.level)
            for h, d in decided
            if d.cap_bytes is not None
        ),
        flag=None if cap is None else vllm_flag(cap),
        environment=None if cap is None else vllm_environment(settings, cap),
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


def explain(settings: VllmSettings, decision: CapDecision, message_bytes: int) -> Explanation:
    """The paths of one message size under the engine's own cap and under the decided one."""
    today, cap = engine_cap(settings), decision.cap_bytes
    fused = fused_choice(settings, message_bytes)
    unfused = displaced_choice(settings, message_bytes)
    return Explanation(
        message_bytes,
        fused if message_bytes <= (today or 0) else unfused_choice(settings, message_bytes),
        fused if message_bytes <= (cap or 0) else unfused,
        today,
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
        comparison.verdict,
    )


def _losing_bands(column: list[Comparison], engine_cap_bytes: int) -> list[LosingBand]:
    """Runs of neighbouring losses within what the engine fuses today."""
    bands: list[LosingBand] = []
    run: list[Comparison] = []
    before = 0
    for comparison in [c for c in column if c.verdict != "not measured"]:
        size = comparison.shape.message_bytes
        if comparison.verdict == "fusion loses" and size <= engine_cap_bytes:
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


def _notes(profile: Profile, settings: VllmSettings) -> list[str]:
    notes = []
    if profile.fingerprint.multicast != settings.multicast:
        has = "with" if profile.fingerprint.multicast else "without"
        notes.append(f"The profile was measured {has} multicast; the question assumes otherwise.")
    if fused_backend(settings) == "mnnvl":
        notes.append(
            f"vLLM {settings.version} fuses with FlashInfer's mnnvl backend where multicast works "
            "(VLLM_FLASHINFER_ALLREDUCE_BACKEND=trtllm selects the other); the fused times here "
            "are trtllm's."
        )
    if flashinfer_active(settings):
        notes.append(
            "FlashInfer's plain all-reduce reads the fusion table and is asked first: setting the "
            "field alone leaves it in place up to the table's size. The fusewise plugin lowers "
            "both; by hand set VLLM_ALLREDUCE_USE_FLASHINFER=0 beside the flag."
        )
    stated = [c.hidden_size for c in profile.crossovers]
    if stated:
        sizes = {format_size(c.message_bytes) for c in profile.crossovers}
        notes.append(
            f"The publication states the crossover at {', '.join(sorted(sizes))} for hidden "
            f"{', '.join(map(str, stated))}."
        )
    return notes
