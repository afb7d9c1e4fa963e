"""What this package's kernels would save an engine on the node of a profile. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fusewise.engines.base import EngineSettings
from fusewise.profiles.intervals import median
from fusewise.profiles.plan import best, difference, judge
from fusewise.profiles.schema import Profile, Sample
from fusewise.shape import Shape, format_size


@dataclass(frozen=True)
class OwnKernels:
    """Where the fastest of our kernels beats what the engine runs today, beyond noise.

    ``compared``: measured shapes with times of both; ``faster_at`` of these it is faster, and by
    ``most_us`` per call at the one with ``message_bytes`` and ``hidden_size``.
    """

    compared: int
    faster_at: int
    most_us: float
    message_bytes: int
    hidden_size: int

    def __str__(self) -> str:
        return (
            f"faster than what runs today at {self.faster_at} of {self.compared} measured sizes, "
            f"by up to {self.most_us:.2f} µs per call (at {format_size(self.message_bytes)}, "
            f"hidden {self.hidden_size}): the plugin's full mode runs them"
        )


def own_kernels(profile: Profile, settings: EngineSettings) -> OwnKernels | None:
    """None where none of ours was measured beside what the engine runs, or none is faster."""
    ours = {path.name for path in profile.paths if path.provider == "native"}
    compared = 0
    gains: dict[tuple[int, int], float] = {}
    for hidden_size, rows in profile.points().items():
        for shape, row in rows.items():
            medians = {name: median(sample.times_us) for name, sample in row.items()}
            mine, today = best(medians, ours), _today(shape, settings)
            if mine is None or today not in row:
                continue
            compared += 1
            gain = _gain_us(shape, row, today, mine, min(medians[today], medians[mine]))
            if gain is not None:
                gains[shape.message_bytes, hidden_size] = gain
    if not gains:
        return None
    at = max(gains, key=lambda one: gains[one])
    return OwnKernels(compared, len(gains), gains[at], *at)


def _today(shape: Shape, settings: EngineSettings) -> str:
    size, hidden_size = shape.message_bytes, shape.hidden_size
    if size <= (settings.cap_bytes(hidden_size) or 0):
        return settings.fused_choice(size, hidden_size)
    return settings.unfused_choice(size, hidden_size)


def _gain_us(
    shape: Shape, row: dict[str, Sample], today: str, mine: str, fastest_us: float
) -> float | None:
    """What ours takes less; None unless it is clear."""
    gain = difference(shape, row, today, mine)
    return gain.median if judge(gain, fastest_us) == "fuse" else None
