"""What to do with one site, from the plan and the range of its num_tokens. Pure; knows no torch.

A graph may serve many sizes. Only the sizes it can be called with count: if they all lie in bands
of one kind the question is settled here, otherwise it is put off to each call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fusewise.operation import Op, backend_of, is_unfused
from fusewise.profiles.bands import Band, Plan, baseline_path, default_band
from fusewise.shape import ELEMENT_BYTES

Choice = Literal["fuse", "decide per call", "all_reduce only", "join", "leave"]


@dataclass(frozen=True)
class TokenRange:
    """``low <= num_tokens <= high``; ``high`` None: no upper end is known."""

    low: int
    high: int | None

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low} tokens"
        return f"{self.low}–{self.high if self.high is not None else '…'} tokens"


@dataclass(frozen=True)
class Decision:
    """What becomes of a site, and the bands that say so.

    Args:
        quantises: every path it may run writes FP8 in its own kernel.
    """

    choice: Choice
    why: str
    quantises: bool = False


def decide(plan: Plan, hidden_size: int, tokens: TokenRange, torch_reduces: bool) -> Decision:
    """The choice for every size a graph can be called with.

    ``fuse`` and ``decide per call`` both put the operation that runs the plan's path into the
    graph. ``leave`` and ``all_reduce only`` keep the norm with Inductor, which may fuse it with
    what follows; the latter lets the plan choose the all-reduce, where it knows a better one than
    torch's own.

    Args:
        plan: of the site's dtype.
        hidden_size: of the site.
        tokens: the sizes this graph serves.
        torch_reduces: the graph's own all-reduce is torch's, the plan's baseline; False where an
            engine's or our operation dispatches by itself.
    """
    bands = bands_between(plan, "all_reduce_rms_norm", hidden_size, tokens)
    why = "; ".join(dict.fromkeys(map(str, bands)))
    fused = {not is_unfused(band.path) for band in bands}
    if fused == {True}:
        ours = {backend_of(band.path).partition(".")[0] for band in bands} == {"native"}
        return Decision("fuse", why, quantises=ours)
    if fused == {True, False}:
        return Decision("decide per call", why)
    bare = bands_between(plan, "all_reduce", hidden_size, tokens)
    if torch_reduces and _paths(bare) != {baseline_path(plan.baseline, "all_reduce")}:
        return Decision("all_reduce only", "; ".join(dict.fromkeys(map(str, bare))))
    return Decision("leave", why)


def bands_between(plan: Plan, op: Op, hidden_size: int, tokens: TokenRange) -> list[Band]:
    """The bands that hold some size of the range, in ascending order; never empty."""
    table = plan.table_for(op, hidden_size)
    if table is None:
        return [default_band(baseline_path(plan.baseline, op))]
    row_bytes = hidden_size * ELEMENT_BYTES[plan.dtype]
    low = tokens.low * row_bytes
    high = None if tokens.high is None else tokens.high * row_bytes
    return [
        band
        for band in table.bands
        if (band.end_bytes is None or band.end_bytes > low)
        and (high is None or band.min_bytes <= high)
    ]


def _paths(bands: Iterable[Band]) -> set[str]:
    return {band.path for band in bands}
