"""What a profile says to do about an engine, ready to be shown. Pure; decides nothing itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusewise.engines.audit import Audit, LosingBand, audit
from fusewise.engines.base import EngineSettings
from fusewise.engines.cap import ExplicitCap
from fusewise.engines.registry import engine_named, names
from fusewise.errors import FusewiseError
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import Level
from fusewise.shape import format_size


@dataclass(frozen=True)
class Advice:
    """One engine on the node of a profile.

    ``audit`` None: it was not audited, and ``problem`` says why. ``lowered``: the cap ends below
    the engine's own, so there is something to paste.
    """

    engine: str
    audit: Audit | None
    lowered: bool = False
    problem: str = ""

    @property
    def headline(self) -> str:
        """The one sentence to read."""
        if self.audit is None:
            return self.problem
        own = self.audit.threshold
        if own is None:
            return "Does not fuse on this node by itself."
        if self.audit.bands:
            worst = max(self.audit.bands, key=lambda band: band.worst_cost_us)
            return (
                f"Its own table fuses up to {own} and loses up to {worst.worst_cost_us:.2f} µs per "
                "call by that. Set the cap:"
            )
        if self.lowered:
            return f"Its own table fuses up to {own}. The cap for this node:"
        if all(row.delta_us is None for row in self.audit.rows):
            return f"Fuses up to {own}; what it would run instead was not measured here."
        return f"Fuses up to {own}; no measured size there loses. Nothing to change."

    @property
    def cures(self) -> bool:
        """Whether there is something to paste."""
        return self.audit is not None and (self.lowered or bool(self.audit.bands))


def losing(band: LosingBand) -> str:
    """A losing band as a line of a list."""
    return (
        f"{format_size(band.above_bytes)}–{format_size(band.to_bytes)} at hidden "
        f"{band.hidden_size}: up to {band.worst_cost_us:.2f} µs per call at "
        f"{format_size(band.worst_at_bytes)}, against {band.unfused_path}"
    )


def of_engine(
    name: str,
    profile: Profile,
    settings: EngineSettings,
    level: Level,
    explicit: ExplicitCap | None = None,
    kernels: str | None = None,
) -> Advice:
    """The advice for one engine with given settings; ``explicit``: a cap somebody set, it wins.

    ``kernels``: the digest of this installation's sources of our kernels.

    Raises:
        StaleProfileError: the settings are of another node than the profile.
    """
    found = audit(profile, settings, explicit=explicit, profile_level=level, kernels=kernels)
    own, cap = settings.cap_bytes(), found.cap.cap_bytes
    return Advice(f"{name} {settings.version}", found, own is not None and (cap or 0) < own)


def of_all_engines(
    profile: Profile, level: Level = "argument", kernels: str | None = None
) -> list[Advice]:
    """Every known engine with its defaults on that node; none where it has no known GPUs."""
    if profile.fingerprint.sm is None:
        return []
    return list(_each(profile, level, kernels))


def _each(profile: Profile, level: Level, kernels: str | None) -> Iterable[Advice]:
    for name in names():
        engine = engine_named(name)
        try:
            version = engine.version()
            settings = engine.settings(version, profile.fingerprint, profile.dtype, {}, {})
            yield of_engine(name, profile, settings, level, kernels=kernels)
        except FusewiseError as error:  # an engine that cannot run there is said, and no fault
            yield Advice(name, None, problem=str(error))
