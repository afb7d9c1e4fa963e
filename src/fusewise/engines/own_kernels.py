"""What this package's kernels would save an engine on the node of a profile. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fusewise.engines.base import EngineSettings
from fusewise.engines.router import NATIVE, full_cap
from fusewise.profiles.intervals import median
from fusewise.profiles.plan import best, difference, judge
from fusewise.profiles.schema import Profile, Sample
from fusewise.shape import Shape, format_size


@dataclass(frozen=True)
class OwnKernels:
    """The fastest of our kernels against what the engine runs today, up to where full mode fuses.

    ``compared``: measured shapes with times of both; at ``faster_at`` of these it is faster beyond
    noise. ``most_us``: saved per call at the shape where it is most; None where nowhere.
    ``stale``: they are times of other sources than those of this installation.
    """

    compared: int
    faster_at: int
    most_us: float | None
    message_bytes: int | None
    hidden_size: int | None
    stale: bool

    def __str__(self) -> str:
        if self.most_us is None or self.message_bytes is None:
            return f"faster than what runs today at none of {self.compared} measured sizes"
        use = "the plugin's full mode runs them"
        if self.stale:
            use = "measured with other sources of theirs, so full mode needs a new `fusewise tune`"
        return (
            f"faster than what runs today at {self.faster_at} of {self.compared} measured sizes, "
            f"by up to {self.most_us:.2f} µs per call (at {format_size(self.message_bytes)}, "
            f"hidden {self.hidden_size}): {use}"
        )


def own_kernels(
    profile: Profile, settings: EngineSettings, kernels: str | None = None
) -> OwnKernels | None:
    """None where none of ours was measured at a size at which full mode could run it.

    Args:
        kernels: the digest of this installation's sources; None: whatever the profile's are.
    """
    if settings.threshold is None:  # where the engine does not fuse, the plugin does nothing
        return None
    compared = 0
    gains: dict[tuple[int, int], float] = {}
    for hidden_size, rows in profile.points().items():
        end = full_cap(profile, settings, hidden_size) or 0
        for shape, row in rows.items():
            gain = _gain_us(shape, row, settings) if shape.message_bytes <= end else None
            if gain is None:
                continue
            compared += 1
            if gain > 0:
                gains[shape.message_bytes, hidden_size] = gain
    if not compared:
        return None
    stale = kernels is not None and profile.fingerprint.kernels != kernels
    if not gains:
        return OwnKernels(compared, 0, None, None, None, stale)
    at = max(gains, key=lambda one: gains[one])
    return OwnKernels(compared, len(gains), gains[at], *at, stale)


def _gain_us(shape: Shape, row: dict[str, Sample], settings: EngineSettings) -> float | None:
    """What the fastest of ours takes less; 0 unless it is clear, None without times of both."""
    today = settings.today(shape.message_bytes, shape.hidden_size)
    medians = {name: median(sample.times_us) for name, sample in row.items()}
    ours = best(medians, [name for name in medians if name.startswith(NATIVE)])
    if ours is None or today not in row:
        return None
    gain = difference(shape, row, today, ours)
    clear = judge(gain, min(medians[today], medians[ours])) == "fuse"
    return gain.median if clear else 0.0
