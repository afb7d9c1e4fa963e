"""What runs calls of a shape and kind, found once and kept: the dictionary of every eager call.

Knows shapes, backends and how the last tensors looked; what a call computes is the backend's,
except where there is nobody to reduce with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fusewise.backends.base import shape_of
from fusewise.backends.norm import residual_rms_norm
from fusewise.run.border import like_these, on_aligned, ready, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.errors import RankTimeoutError
    from fusewise.operation import Op
    from fusewise.run.paths import Paths

_MAX_RUNS = 16_384  # one per shape and kind of call; near 2 KB each
# Kinds of call that have a latest run: 0 to 3 are the fused operation, plus 2 without a residual,
# plus 1 with a weight bias.
SUM = 4


class Run:
    """What runs calls of one shape and kind, and how the tensors of the last one looked.

    Args:
        call: takes contiguous tensors of that shape at any address.
        here: the group's device.
    """

    __slots__ = ("_here", "call", "seen")

    def __init__(self, call: Callable[..., Any], here: torch.device) -> None:
        self.call, self._here = call, here
        self.seen: Callable[..., bool] = unknown

    def takes(
        self, x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None
    ) -> bool:
        """Whether these may go to ``call`` as they are; ``seen`` then knows their like."""
        if not ready(x, residual, weight, self._here):
            return False
        tensors = [t for t in (x, weight, residual) if t is not None]
        seen = like_these(*tensors)
        if any(t.requires_grad for t in tensors):  # parameters: fine as long as nothing records
            self.seen = lambda *given: not torch.is_grad_enabled() and seen(*given)
        else:
            self.seen = seen
        return True


_NONE = Run(unknown, torch.device("cpu"))  # has seen nothing


class Runs(dict[tuple[Any, ...], Run]):
    """Runs by shape, dtype and kind of call. A death empties it, so that the next call asks.

    A model's layers call alike, so most calls need no more than a look at the ``latest`` of their
    kind: whether its ``seen`` knows the tensors.

    Args:
        paths: what chooses a backend.
        here: the group's device.
    """

    def __init__(self, paths: Paths, here: torch.device) -> None:
        super().__init__()
        self._paths, self._here, self._dead = paths, here, False
        self.latest = [_NONE] * (SUM + 1)
        paths.on_death(self.die)

    def of(self, op: Op, x: Tensor, rows: Tensor, *kind: bool) -> Run:
        """What runs a call on ``x``, viewed as ``rows``; kept for the next one of its shape.

        Args:
            op: the operation.
            x: as the caller has it.
            rows: two-dimensional and usable.
            kind: of the fused operation: without residual, with a weight bias, then True for FP8.

        Raises:
            RankTimeoutError: a backend of this group is dead, whichever would run.
        """
        self._paths.check()
        tail = rows.dtype, *kind
        found = self.get((rows.shape, *tail))
        if found is None:
            if len(self) >= _MAX_RUNS:
                self.clear()
            shape, fp8 = shape_of(rows), len(kind) > 2
            backend = self._paths.choose(op, shape, *kind[:2])
            prepared = None if fp8 else backend.prepared(op, shape)
            call = getattr(backend, f"{op}_fp8") if fp8 else on_aligned(getattr(backend, op))
            found = self[(rows.shape, *tail)] = Run(prepared or call, self._here)
            if prepared is not None:  # it takes x in its own shape
                self[(x.shape, *tail)] = Run(prepared, self._here)
            if self._dead:
                self.clear()
        return found

    def remember(self, kind: int, run: Run) -> None:
        """Makes it the latest of its kind."""
        self.latest[kind] = run
        if self._dead:
            self.clear()

    def clear(self) -> None:
        """Forgets all of them."""
        super().clear()
        self.latest[:] = [_NONE] * len(self.latest)

    def die(self, error: RankTimeoutError) -> None:
        """From the watchdog's thread: no call finds its run any more."""
        self._dead = True
        self.clear()


def alone(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    """What a group of one computes, and any group of an empty message: new tensors."""
    norm, total = residual_rms_norm(x, residual, weight, eps, weight_bias)
    return norm, total.clone() if residual is None else total
