"""A candidate's entrance exam, in a child that may be killed: awkward shapes, forms, graph replay.

What engines got wrong before is asked here: 1 to 17 tokens with the next kernel right behind (early
completion of a dependent launch), no residual, Gemma's weight, and a captured graph replayed while
other sizes come in between. A failure is an exclusion with its reason, never a timing.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from fusewise.errors import VerificationError
from fusewise.shape import DType, Shape
from fusewise.tuning.timing import Buffers, bound_call
from fusewise.tuning.verify import (
    check_all_reduce_rms_norm,
    poisoned_memory,
    settle,
    verify,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.base import Backend
    from fusewise.group import Group

_FEW_TOKENS = range(1, 18)
_REPLAY_TOKENS = (1, 3, 8, 17, 64)
_REPLAYS = 200


def examine(backend: Backend, group: Group, hidden_size: int, dtype: DType) -> None:
    """Verifies everything a backend says it can do, at small shapes. Collective.

    Raises:
        VerificationError: on all ranks alike.
    """
    shapes = [Shape(tokens, hidden_size, dtype) for tokens in _FEW_TOKENS]
    shapes = [shape for shape in shapes if backend.admits(shape) is None]
    for seed, shape in enumerate(shapes):
        verify(backend, group, "all_reduce_rms_norm", shape, seed)
        if backend.plain:
            verify(backend, group, "all_reduce", shape, seed)
    if not shapes:
        return
    middle = shapes[len(shapes) // 2]
    if backend.takes_no_residual:
        check = check_all_reduce_rms_norm(backend, group, middle, 1, with_residual=False)
        settle(group, f"{backend.id} without residual", check)
    if backend.takes_weight_bias:
        check = check_all_reduce_rms_norm(backend, group, middle, 2, weight_bias=1.0)
        settle(group, f"{backend.id} with weight bias", check)
    if group.device.type == "cuda":
        _replay(backend, group, hidden_size, dtype)


def _replay(backend: Backend, group: Group, hidden_size: int, dtype: DType) -> None:
    """Graphs of several sizes, replayed in one random order on all ranks, stay right."""
    shapes = [Shape(tokens, hidden_size, dtype) for tokens in _REPLAY_TOKENS]
    shapes = [shape for shape in shapes if backend.admits(shape) is None]
    graphs: list[tuple[Shape, torch.cuda.CUDAGraph, Tensor, Tensor]] = []
    for shape in shapes:
        call = bound_call(backend, "all_reduce_rms_norm", Buffers(group, shape))
        expected = call(0)[0].clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), poisoned_memory():
            # The clone is the dependent consumer: it must see the finished output.
            out = call(0)[0].clone()
        backend.capture_end()
        graphs.append((shape, graph, out, expected))
    order = random.Random(0)
    wrong = torch.zeros((), dtype=torch.int64, device=group.device)
    for _ in range(_REPLAYS):
        _, graph, out, expected = order.choice(graphs)
        graph.replay()
        wrong += (out != expected).sum()
    torch.cuda.synchronize()
    failed = group.vote(f"{backend.id}: replay", f"{int(wrong)} wrong" if int(wrong) else None)
    if failed:
        raise VerificationError(
            f"{backend.id} changes its result when graphs are replayed",
            expected=f"{_REPLAYS} replays of {[str(s) for s in shapes]} equal to the eager call",
            got=failed,
        )
