"""Which shapes to measure next: a doubling grid first, then bisection towards each crossover.

Pure: decides from the samples so far; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from fusewise.operation import backend_of, is_unfused
from fusewise.profiles.plan import Point
from fusewise.shape import DType, Shape, size_grid

# Neighbours closer than this ratio of sizes are near enough: the crossover is placed within 10 %.
_CLOSE = 1.10


def coarse_order(
    hidden_sizes: Sequence[int], min_bytes: int, max_bytes: int, dtype: DType
) -> list[Shape]:
    """The grid in an order that is useful wherever time runs out: every fourth size first."""
    columns = [size_grid(min_bytes, max_bytes, hidden, dtype) for hidden in hidden_sizes]
    order: list[Shape] = []
    for start, step in ((0, 4), (2, 4), (1, 2)):
        for column in columns:
            order += [shape for shape in column[start::step] if shape not in order]
    for column in columns:
        if column[-1] not in order:
            order.append(column[-1])
    return order


def next_shapes(points: Mapping[int, Sequence[Point]], providers: Mapping[str, str]) -> list[Shape]:
    """Midpoints of every pair of neighbours between which the winning backend changes.

    Args:
        points: hidden size → decided points in ascending size.
        providers: fused path → provider. Besides the chosen path, each provider's own fused
            kernel is followed against the best unfused path: an engine may have only that one.
    """
    found: list[Shape] = []
    for column in points.values():
        for before, after in pairwise(column):
            middle = _between(before.shape, after.shape)
            if middle and (
                backend_of(before.chosen) != backend_of(after.chosen)
                or any(
                    _leads(before, fused) is not _leads(after, fused)
                    for fused in _families(providers)
                )
            ):
                found.append(middle)
    return found


def _families(providers: Mapping[str, str]) -> list[set[str]]:
    return [
        {path for path, owner in providers.items() if owner == provider}
        for provider in sorted(set(providers.values()))
    ]


def _leads(point: Point, fused: set[str]) -> bool | None:
    """Whether this family's best fused path beats the best unfused one; None if unknown."""
    ours = [time for path, time in point.medians_us.items() if path in fused]
    unfused = [time for path, time in point.medians_us.items() if is_unfused(path)]
    return min(ours) < min(unfused) if ours and unfused else None


def _between(low: Shape, high: Shape) -> Shape | None:
    """The geometric middle in whole tokens; None when the two are close enough already."""
    if high.num_tokens <= low.num_tokens * _CLOSE:
        return None
    middle = round(math.sqrt(low.num_tokens * high.num_tokens))
    if middle in (low.num_tokens, high.num_tokens):
        return None
    return Shape(middle, low.hidden_size, low.dtype)
