"""Profiles of the very node a test's ranks run on."""

from __future__ import annotations

from fusewise.profiles.schema import Profile
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.shape import Shape
from tests.samples import profile_of

SHM, GLOO = "shm.one_shot", "gloo + rms_norm"


def node_profile(fused_us: float = 1.0) -> Profile:
    """A profile of this very node that prefers shm (or gloo, when shm is slow) up to 4 MiB."""
    mark = fingerprint_of(Group())
    medians = {t: {SHM: fused_us, GLOO: 5.0} for t in (1, 1024)}
    return profile_of(medians, node=mark, baseline=GLOO, spread=0.0)


def rows_of_64(tokens: int) -> Shape:
    """``tokens`` rows of 64 elements in bf16."""
    return Shape(tokens, 64)
