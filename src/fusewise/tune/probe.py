"""A candidate's entrance exam, in a child that may be killed: awkward shapes, forms, graph replay.

What engines got wrong before is asked here: 1 to 17 tokens with the next kernel right behind (early
completion of a dependent launch), no residual, Gemma's weight, and a captured graph replayed while
other sizes come in between. A failure is an exclusion with its reason, never a timing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from fusewise.errors import VerificationError
from fusewise.shape import DType, Shape
from fusewise.tune.candidates import offered
from fusewise.tune.operands import Case, usual
from fusewise.tune.timing import Arena, Buffers, bound_call, captured, graphs_hold
from fusewise.tune.verify import verify

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.base import Backend

_FEW_TOKENS = range(1, 18)
_REPLAY_TOKENS = (1, 3, 8, 17, 64)
_REPLAYS = 1000


def examine(backend: Backend, arena: Arena, hidden_size: int, dtype: DType) -> None:
    """Verifies everything a backend says it can do, at small shapes. Collective.

    Raises:
        VerificationError: on all ranks alike.
    """
    group = backend.group
    shapes = _admitted(backend, _FEW_TOKENS, hidden_size, dtype)
    for seed, shape in enumerate(shapes):
        for op in offered(backend):
            verify(backend, group, usual(op, shape, seed))
    if not shapes:
        return
    middle = shapes[len(shapes) // 2]
    if backend.takes_no_residual:
        verify(backend, group, Case("all_reduce_rms_norm", middle, 1, with_residual=False))
    if backend.takes_weight_bias:
        verify(backend, group, Case("all_reduce_rms_norm", middle, 2, weight_bias=1.0))
    if graphs_hold(backend):
        _replay(backend, arena, _admitted(backend, _REPLAY_TOKENS, hidden_size, dtype))


def _admitted(
    backend: Backend, tokens: Iterable[int], hidden_size: int, dtype: DType
) -> list[Shape]:
    shapes = [Shape(count, hidden_size, dtype) for count in tokens]
    return [shape for shape in shapes if backend.admits(shape) is None]


def _replay(backend: Backend, arena: Arena, shapes: list[Shape]) -> None:
    """Graphs of several sizes, replayed in one random order on all ranks, stay right."""
    group = backend.group
    graphs: list[tuple[Callable[[], None], Tensor, Tensor]] = []
    for shape in shapes:
        call = bound_call(backend, "all_reduce_rms_norm", Buffers(arena, shape))
        expected = call(0)[0].clone()
        out = torch.full_like(expected, float("nan"))

        def consumed(_: int, call: Callable[[int], Any] = call, out: Tensor = out) -> None:
            out.copy_(call(0)[0])  # the dependent consumer: it must see the finished output

        graphs.append((captured(backend, consumed, 1), out, expected))
    order = random.Random(0)
    wrong = torch.zeros((), dtype=torch.int64, device=group.device)
    for _ in range(_REPLAYS):
        replay, out, expected = order.choice(graphs)
        out.fill_(float("nan"))
        replay()
        wrong += (out != expected).sum()
    count = int(wrong)
    failed = group.vote(f"{backend.id}: replay", f"{count} wrong" if count else None)
    if failed:
        raise VerificationError(
            f"{backend.id} changes its result when graphs are replayed",
            expected=f"{_REPLAYS} replays of {[str(s) for s in shapes]} equal to the eager call",
            got=failed,
        )
