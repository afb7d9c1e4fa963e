"""Bands: contiguous size ranges with one winner each, and the lookup by bisection. Pure.

A ``Plan`` is what a communicator runs. It is small, hashable and travels between ranks as JSON;
how it is derived from measurements is ``plan.py``'s business.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fusewise.errors import ProfileError
from fusewise.operation import Op, backend_of, unfused_path
from fusewise.shape import DType, format_size

Verdict = Literal["fuse", "do not fuse", "inconclusive"]
# extrapolated: below the smallest measured size, whose path runs there too.
Origin = Literal["measured", "published", "extrapolated", "rule", "engine default"]


@dataclass(frozen=True)
class Band:
    """Sizes ``min_bytes <= size < end_bytes`` run ``path``; ``end_bytes`` None: no upper end."""

    min_bytes: int
    end_bytes: int | None
    path: str
    verdict: Verdict
    origin: Origin

    def __str__(self) -> str:
        end = format_size(self.end_bytes) if self.end_bytes is not None else "…"
        return f"{format_size(self.min_bytes)}–{end}: {self.path} ({self.verdict})"


@dataclass(frozen=True)
class Table:
    """The bands of one operation at one hidden size, from 0 bytes to infinity without a gap."""

    op: Op
    hidden_size: int
    bands: tuple[Band, ...]
    validated_from: int
    validated_to: int
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_contiguous(self.bands, f"{self.op} hidden {self.hidden_size}")
        object.__setattr__(self, "_starts", tuple(band.min_bytes for band in self.bands))

    def band_at(self, message_bytes: int) -> Band:
        """The band that holds ``message_bytes`` (>= 0)."""
        return self.bands[bisect_right(self._starts, message_bytes) - 1]


def check_contiguous(bands: tuple[Band, ...], where: str) -> None:
    """Bands must start at 0, follow each other without gap or overlap, and end open.

    Raises:
        ProfileError: they do not.
    """
    expected_start: int | None = 0
    for i, band in enumerate(bands):
        if band.min_bytes != expected_start:
            kind = "overlap" if expected_start is None or band.min_bytes < expected_start else "gap"
            raise ProfileError(
                f"bands of {where}: {kind} at band {i}",
                expected=f"a start of {expected_start}",
                got=str(band.min_bytes),
            )
        if band.end_bytes is not None and band.end_bytes <= band.min_bytes:
            raise ProfileError(f"bands of {where}: band {i} is empty", got=str(band))
        expected_start = band.end_bytes
    if not bands or expected_start is not None:
        raise ProfileError(f"bands of {where}: the last band must be open", got=str(bands[-1:]))


@dataclass(frozen=True)
class Plan:
    """The decision table of one dtype. ``baseline`` runs wherever nothing was decided."""

    dtype: DType
    baseline: str
    tables: tuple[Table, ...]
    source: str

    def table_for(self, op: Op, hidden_size: int) -> Table | None:
        """The table measured at the hidden size nearest (by ratio) to ``hidden_size``."""
        tables = [table for table in self.tables if table.op == op]
        if not tables:
            return None
        return min(tables, key=lambda t: abs(math.log(t.hidden_size / hidden_size)))

    def band_at(self, op: Op, hidden_size: int, message_bytes: int) -> Band:
        """The band that decides one message; an engine-default band where nothing is known."""
        table = self.table_for(op, hidden_size)
        if table is None:
            return default_band(baseline_path(self.baseline, op))
        band = table.band_at(message_bytes)
        if hidden_size == table.hidden_size or message_bytes >= table.validated_from:
            return band
        # One token of a narrower row is less than the smallest that was measured.
        end = table.validated_from
        return Band(band.min_bytes, end, band.path, "inconclusive", "extrapolated")

    def paths(self) -> set[str]:
        """Every path some band names, the baseline included."""
        named = {band.path for table in self.tables for band in table.bands}
        return named | {self.baseline}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the other ranks and for JSON output."""
        document = asdict(self)
        for table in document["tables"]:
            del table["_starts"]
        return document

    @staticmethod
    def from_dict(document: dict[str, Any]) -> Plan:
        """The inverse of ``to_dict``; checks the bands again.

        Raises:
            ProfileError: bands overlap or leave a gap.
        """
        tables = tuple(
            Table(**{**table, "bands": tuple(Band(**band) for band in table["bands"])})
            for table in document["tables"]
        )
        return Plan(**{**document, "tables": tables})

    @property
    def digest(self) -> str:
        """SHA-256 of the decisions: equal digests mean equal choices on every rank."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def baseline_path(baseline: str, op: Op) -> str:
    """The baseline's name for an operation: ``nccl + rms_norm`` or ``nccl``."""
    return unfused_path(backend_of(baseline), op)


def default_band(path: str) -> Band:
    """All sizes to ``path``, as an engine default."""
    return Band(0, None, path, "inconclusive", "engine default")


def default_plan(dtype: DType, baseline: str) -> Plan:
    """The plan without any measurement: the baseline everywhere, and it says so."""
    return Plan(dtype, baseline, (), "no profile applies")
