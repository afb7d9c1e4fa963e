"""Why one message runs on one path: the band that holds it, who decided, the nearest measurement.

Pure conversions of a profile's plan; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusewise.operation import Op
from fusewise.profiles.bands import Band, Table
from fusewise.profiles.intervals import Interval
from fusewise.profiles.plan import Point, decide_points, derive
from fusewise.profiles.schema import Numerics, Profile
from fusewise.profiles.store import Resolution
from fusewise.report.crossings import FUSABLE
from fusewise.report.table import Column, Section, facts
from fusewise.shape import Shape, format_size, tokens_at

_DEFAULT_PATH = "the engine's own"


@dataclass(frozen=True)
class Reasons:
    """All that speaks for a decision. Without a profile most of it is None."""

    message_bytes: int
    op: Op
    row: Shape  # one token's
    found: Resolution
    band: Band | None = None
    table: Table | None = None
    nearest: Point | None = None
    gain: Interval | None = None  # of the nearest point; None where no interval is known
    numerics: Numerics | None = None

    @property
    def path(self) -> str:
        """What runs."""
        return _DEFAULT_PATH if self.band is None else self.band.path

    @property
    def level(self) -> str:
        """Who decided."""
        measured = self.band is not None and self.band.origin != "engine default"
        return self.found.level if measured else "engine default"

    @property
    def num_tokens(self) -> int:
        """Whole rows of the message."""
        return tokens_at(self.message_bytes, self.row.hidden_size, self.row.dtype)

    @property
    def note(self) -> str | None:
        """What the nearest measurement says of itself, and whether anybody sends such a message."""
        told = [self.nearest.note] if self.nearest is not None and self.nearest.note else []
        if not self.num_tokens:
            row = f"{self.row.row_bytes} bytes at hidden {self.row.hidden_size}"
            told.append(f"smaller than one token ({row}): no model sends it")
        return "; ".join(told) or None

    @property
    def verdict(self) -> str | None:
        """On fusing; None where there is nothing to fuse."""
        return self.band.verdict if self.band is not None and self.op == FUSABLE else None

    @property
    def because(self) -> str | None:
        """Where no measurement at this size decides, why not."""
        if self.band is None:
            return self.found.where
        if self.table is None:
            return f"{self.op} was not measured"
        if self.band.origin == "extrapolated":
            first = format_size(self.table.validated_from)
            return f"nothing smaller than {first} was measured; what runs there runs here too"
        if self.band.origin == "engine default":
            last = format_size(self.table.validated_to)
            return f"nothing larger than {last} was measured"
        return None


def reasons(found: Resolution, op: Op, row: Shape, message_bytes: int) -> Reasons:
    """What the profile found says about one message.

    Args:
        found: the profile that answers, or none.
        op: the operation.
        row: one token: hidden size and dtype.
        message_bytes: of the message.
    """
    profile = found.profile
    if profile is None:
        return Reasons(message_bytes, op, row, found)
    plan = derive(profile)
    band = plan.band_at(op, row.hidden_size, message_bytes)
    table = plan.table_for(op, row.hidden_size)
    if table is None:
        return Reasons(message_bytes, op, row, found, band)
    points = decide_points(profile, op)[table.hidden_size]
    point = min(points, key=lambda p: abs(p.shape.message_bytes - message_bytes))
    numerics = {path.name: path.numerics for path in profile.paths}.get(band.path)
    return Reasons(
        message_bytes, op, row, found, band, table, point, _interval(profile, point), numerics
    )


def _interval(profile: Profile, point: Point) -> Interval | None:
    """Of the gain, where rounds were recorded: a published number has none."""
    row = profile.points()[point.shape.hidden_size].get(point.shape, {})
    spread = all(len(sample.times_us) > 1 for sample in row.values())
    return point.gain if row and spread else None


def explained(answer: Reasons) -> tuple[Section, Section]:
    """As facts for people and one record for machines; then the nearest point's times."""
    return (
        facts("explain", _record(answer), _shown(answer)),
        Section("times", _TIMES, [], data=_times(answer)),
    )


_TIMES = tuple(
    Column(name, name) for name in ("path", "message_bytes", "num_tokens", "hidden_size", "time_us")
)


def _record(answer: Reasons) -> dict[str, Any]:
    band, table, point = answer.band, answer.table, answer.nearest
    gain, numerics = answer.gain, answer.numerics
    exact = point.gain if point else None
    return {
        "message_bytes": answer.message_bytes,
        "num_tokens": answer.num_tokens,
        "hidden_size": answer.row.hidden_size,
        "dtype": answer.row.dtype,
        "op": answer.op,
        "path": answer.path,
        "verdict": answer.verdict,
        "level": answer.level,
        "origin": band.origin if band else "engine default",
        "profile": answer.found.where if answer.found.profile else None,
        "because": answer.because,
        "band_min_bytes": band.min_bytes if band else None,
        "band_end_bytes": band.end_bytes if band else None,
        "validated_from_bytes": table.validated_from if table else None,
        "validated_to_bytes": table.validated_to if table else None,
        "measured_hidden_size": table.hidden_size if table else None,
        "nearest_bytes": point.shape.message_bytes if point else None,
        "gain_us": exact.median if exact else None,
        "gain_low_us": gain.low if gain else None,
        "gain_high_us": gain.high if gain else None,
        "note": answer.note,
        "accumulation": numerics.accumulation if numerics else None,
        "order": numerics.order if numerics else None,
        "rounds_sum": numerics.rounds_sum if numerics else None,
    }


def _times(answer: Reasons) -> list[dict[str, Any]]:
    point = answer.nearest
    return [
        {
            "path": path,
            "message_bytes": point.shape.message_bytes,
            "num_tokens": point.shape.num_tokens,
            "hidden_size": point.shape.hidden_size,
            "time_us": time_us,
        }
        for path, time_us in _fastest_first(point)
    ] if point else []  # fmt: skip


def _fastest_first(point: Point) -> list[tuple[str, float]]:
    return sorted(point.medians_us.items(), key=lambda item: item[1])


def _shown(answer: Reasons) -> list[tuple[str, Any]]:
    band, table, point = answer.band, answer.table, answer.nearest
    size, asked = answer.message_bytes, answer.row.hidden_size
    shown: list[tuple[str, Any]] = [
        ("size", f"{format_size(size)} ({size} bytes)"),
        ("tokens", answer.num_tokens or None),
        ("operation", answer.op),
        ("path", answer.path),
        ("verdict", answer.verdict),
        ("level", answer.level),
        ("because", answer.because),
    ]
    if band is not None:
        shown += [
            ("origin", band.origin),
            ("profile", answer.found.where),
            ("band", str(band)),
        ]
    if table is not None and point is not None:
        other = f"{asked} was not measured; {table.hidden_size} answers"
        times = ", ".join(f"{name} {time_us:.2f} µs" for name, time_us in _fastest_first(point))
        shown += [
            (
                "validated",
                f"{format_size(table.validated_from)} to {format_size(table.validated_to)}",
            ),
            ("hidden size", str(asked) if table.hidden_size == asked else other),
            ("nearest measured", f"{format_size(point.shape.message_bytes)}: {times}"),
            ("gain of fusing", _gain(point.gain, answer.gain)),
        ]
    shown.append(("note", answer.note))
    if answer.numerics is not None:
        shown.append(
            ("numerics", ", ".join(f"{k} {v}" for k, v in answer.numerics.model_dump().items()))
        )
    return shown


def _gain(gain: Interval | None, spread: Interval | None) -> str | None:
    if gain is None:
        return None
    between = f"[{spread.low:+.2f}, {spread.high:+.2f}]" if spread else "(no interval published)"
    return f"{gain.median:+.2f} µs {between} against the best unfused"
