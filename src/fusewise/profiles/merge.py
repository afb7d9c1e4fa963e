"""Two profiles of one node → one, losing no point that either has. Pure."""

from __future__ import annotations

from fusewise.errors import StaleProfileError
from fusewise.node import HARDWARE, SOFTWARE
from fusewise.operation import backend_of
from fusewise.profiles.match import as_it_counts
from fusewise.profiles.schema import Exclusion, Profile

LEFT_OUT = "excluded by --without"  # the caller's wish, and no fault of the backend


def differences(old: Profile, new: Profile) -> list[str]:
    """What makes two profiles those of different nodes, a line each; empty: they may be one."""
    found = old.fingerprint.differences(new.fingerprint, (*HARDWARE, *SOFTWARE))
    pairs = {
        "dtype": (old.dtype, new.dtype),
        "baseline": (old.baseline, new.baseline),
        "origin": (old.provenance.origin, new.provenance.origin),
    }
    return found + [f"{name}: {a} in one, {b} in the other" for name, (a, b) in pairs.items()
                    if a != b]  # fmt: skip


def extended(old: Profile, new: Profile) -> Profile:
    """``old`` with what ``new`` measured.

    A shape that both measured is the newer one's alone, with all its paths: rounds are paired
    within one run. A backend that has since failed loses its older timings too; one that was only
    left out by ``--without`` keeps them. Timings of our own kernels go when their sources changed.

    Raises:
        StaleProfileError: the two are of different nodes, versions or dtypes.
    """
    other = differences(old, new)
    if other:
        raise StaleProfileError("profiles of two nodes do not merge", got="; ".join(other))
    counting = as_it_counts(old, new.fingerprint, "the older one")[0]
    if counting is None:
        return new
    old = counting
    failed = {item.backend for item in new.excluded if item.reason != LEFT_OUT}
    fresh = {(s.op, s.num_tokens, s.hidden_size) for s in new.samples}
    kept = tuple(
        s for s in old.samples
        if (s.op, s.num_tokens, s.hidden_size) not in fresh and backend_of(s.path) not in failed
    )  # fmt: skip
    samples = (*kept, *new.samples)
    records = {path.name: path for path in (*old.paths, *new.paths)}
    measured = {s.path for s in samples}
    paths = tuple(path for path in records.values() if path.name in measured)
    earlier = old.provenance.duration_s or 0.0
    return new.model_copy(
        update={
            "samples": samples,
            "paths": paths or new.paths,
            "excluded": _exclusions(old, new, {backend_of(name) for name in measured}),
            "deltas": (*old.deltas, *(d for d in new.deltas if d not in old.deltas)),
            "crossovers": (
                *old.crossovers,
                *(c for c in new.crossovers if c not in old.crossovers),
            ),
            "provenance": new.provenance.model_copy(
                update={
                    "extends": old.provenance.created,
                    "duration_s": round((new.provenance.duration_s or 0.0) + earlier, 1),
                }
            ),
        }
    )


def _exclusions(old: Profile, new: Profile, measured: set[str]) -> tuple[Exclusion, ...]:
    """The newest reason of every backend that has no timing."""
    reasons = {item.backend: item for item in (*old.excluded, *new.excluded)}
    return tuple(item for item in reasons.values() if item.backend not in measured)
