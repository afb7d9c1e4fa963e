"""How long a call takes as deployed: whole paths, many calls per CUDA graph, rotated buffers.

All candidates of one shape are prepared first and then run in interleaved rounds without a host
synchronisation in between, so that drift hits all alike and the collectives themselves keep the
ranks in step. A time is the maximum over ranks of one round, divided by its calls.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fusewise.operation import Op, variant_path
from fusewise.profiles.schema import Sample
from fusewise.shape import Shape
from fusewise.tune.operands import normals
from fusewise.tune.settings import ROUNDS
from fusewise.tune.verify import EPS

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.base import Backend
    from fusewise.ranks.group import Group
    from fusewise.run.communicator import Communicator

# A round long enough that its edges (graph launch, scheduler tick) weigh under two percent, at an
# expected time per call of floor + bytes / rate: for GPUs the order of the published two-GPU times,
# for CPU ranks of what two of them did here. Only the length of a round depends on it.
_ROUND_US = {"cuda": 400.0, "cpu": 2000.0}
_FLOOR_US = {"cuda": 5.0, "cpu": 300.0}
_BYTES_PER_US = {"cuda": 150e3, "cpu": 500.0}
_MAX_CALLS = 32
# Inputs rotate through this much memory, twice the 50-60 MB of L2 on H100 and H200.
_ROTATE_BYTES = {"cuda": 120 * 2**20, "cpu": 8 * 2**20}
_BLOCK = 2**20  # elements of the pattern that fills the arena
_WARM_CALLS = 3


class Arena:
    """The memory all inputs of a tune are slices of, filled once with normals.

    One allocation for all shapes: peers may have mapped it, so it must not come and go.
    """

    def __init__(self, group: Group, max_shape: Shape) -> None:
        device = group.device
        elements = max(_ROTATE_BYTES[device.type], 4 * max_shape.message_bytes)
        elements //= max_shape.row_bytes // max_shape.hidden_size
        block = normals(Shape(1, _BLOCK, max_shape.dtype), group.rank, device, 1).view(-1)
        self.values = block.repeat(-(-elements // _BLOCK))
        self.weight = torch.ones(max_shape.hidden_size, dtype=block.dtype, device=device)


class Buffers:
    """Inputs that rotate, so that no call finds its operands in cache by accident."""

    def __init__(self, arena: Arena, shape: Shape) -> None:
        kind, size = arena.values.device.type, shape.num_tokens * shape.hidden_size
        self.shape = shape
        fitting = _ROTATE_BYTES[kind] // max(1, 2 * shape.message_bytes)
        self.calls = calls_per_round(kind, shape)
        self.count = max(2, min(self.calls, fitting))
        parts = [arena.values[i * size :][:size] for i in range(2 * self.count)]
        rows = [part.view(shape.num_tokens, shape.hidden_size) for part in parts]
        self.x, self.residual = rows[: self.count], rows[self.count :]
        self.weight = arena.weight[: shape.hidden_size]


def calls_per_round(kind: str, shape: Shape) -> int:
    """How many calls fill a round: one number per shape, for all candidates and ranks."""
    expected_us = _FLOOR_US[kind] + shape.message_bytes / _BYTES_PER_US[kind]
    return max(2, min(_MAX_CALLS, round(_ROUND_US[kind] / expected_us)))


def graphs_hold(backend: Backend) -> bool:
    """Whether the backend's calls can be captured in CUDA graphs here."""
    return backend.group.device.type == "cuda" and backend.capturable


class Runner:
    """One candidate at one shape, ready to be timed; on GPUs a captured graph of its calls.

    Constructing is collective, and selects the variant for good on GPUs only: the graph keeps it.
    """

    def __init__(self, backend: Backend, op: Op, buffers: Buffers, variant: str = "") -> None:
        self.path = variant_path(backend.path_name(op), variant)
        backend.select(op, buffers.shape, variant)
        self.calls = buffers.calls
        self._cuda = graphs_hold(backend)
        call = bound_call(backend, op, buffers)
        self._run = captured(backend, call, self.calls) if self._cuda else _looped(call, self.calls)
        self._run()
        synchronise(backend.group.device)

    def start(self) -> tuple[Any, Any]:
        """Enqueues one round; returns its two marks."""
        if self._cuda:
            begin, end = _event(), _event()
            begin.record()
            self._run()
            end.record()
            return begin, end
        begin_s = time.perf_counter()
        self._run()
        return begin_s, time.perf_counter()

    def time_us(self, marks: tuple[Any, Any]) -> float:
        """Microseconds per call of a round that has ended."""
        begin, end = marks
        elapsed_us = begin.elapsed_time(end) * 1e3 if self._cuda else (end - begin) * 1e6
        return float(elapsed_us) / self.calls


def bound_call(backend: Backend, op: Op, buffers: Buffers) -> Callable[[int], Any]:
    """``call(i)`` runs the operation on the i-th set of buffers."""
    count, x, residual = buffers.count, buffers.x, buffers.residual

    def all_reduce(i: int) -> Tensor:
        return backend.all_reduce(x[i % count])

    def fused(i: int) -> tuple[Tensor, Tensor]:
        at = i % count
        return backend.all_reduce_rms_norm(x[at], residual[at], buffers.weight, EPS)

    return all_reduce if op == "all_reduce" else fused


def interleave(
    group: Group, runners: Sequence[Runner], rounds: int = ROUNDS
) -> dict[str, tuple[float, ...]]:
    """Times of every runner: path → ``rounds`` paired observations in µs. Collective.

    A lead-in round of each absorbs the ranks' different starts. Every round has an order of its
    own, the same on all ranks: a candidate that leaves the ranks apart costs whoever follows it,
    and in an order that only rotates that is always the same one (behind FlashInfer's two-shot at
    few tokens our kernel took up to twice its time on two H100s).
    """
    group.barrier("lead-in")
    for runner in runners:
        runner.start()
    marks: list[list[Any]] = [[None] * rounds for _ in runners]
    shuffled = random.Random(rounds)
    for i in range(rounds):
        for at in shuffled.sample(range(len(runners)), len(runners)):
            marks[at][i] = runners[at].start()
    synchronise(group.device)
    mine = [
        [runner.time_us(mark) for mark in column]
        for runner, column in zip(runners, marks, strict=True)
    ]
    everyone = group.gather("times", mine)
    return {
        runner.path: tuple(round(max(ranks[k][i] for ranks in everyone), 4) for i in range(rounds))
        for k, runner in enumerate(runners)
    }


def measured(
    group: Group, runners: Sequence[Runner], op: Op, shape: Shape, rounds: int
) -> list[Sample]:
    """The runners' times as a profile keeps them. Collective."""
    times = interleave(group, runners, rounds)
    return [
        Sample(
            op=op, path=path, num_tokens=shape.num_tokens, hidden_size=shape.hidden_size,
            times_us=times_us,
        )
        for path, times_us in times.items()
    ]  # fmt: skip


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def synchronise(device: torch.device) -> None:
    """Waits for the device's queue; nothing on CPUs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _looped(call: Callable[[int], Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for i in range(calls):
            call(i)

    return run


def captured(
    owner: Backend | Communicator, call: Callable[[int], Any], calls: int, warm: int = _WARM_CALLS
) -> Callable[[], None]:
    """A CUDA graph of ``calls`` calls, registered with the backends of its owner.

    Called eagerly ``warm`` times first: kernels that compile at first use must not do so under
    capture.
    """
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(warm):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with owner.capture(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(calls):
            call(i)
    return graph.replay
