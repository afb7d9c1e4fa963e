"""The benchmark as one rank runs it: every path at every size, with the count of wrong elements.

Unlike a tune it leaves nothing out for being wrong: it shows the number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusewise.backends.registry import select
from fusewise.operation import OPERATIONS, Op
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.shape import size_grid
from fusewise.tune.candidates import build_all, taking
from fusewise.tune.operands import usual
from fusewise.tune.settings import Settings
from fusewise.tune.timing import Arena, Buffers, Runner, measured
from fusewise.tune.verify import check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewise.backends.base import Backend
    from fusewise.ranks.worker import Worker


def bench_rank(worker: Worker, request: dict[str, Any]) -> list[Any]:
    """The job: [sample, wrong elements] per path, shape and operation, on every rank."""
    settings = Settings(**request["settings"])
    group = Group(timeout_s=settings.timeout_s)
    backends: list[Backend] = []
    node = fingerprint_of(group)
    unwanted = select(settings.without) | request["excluded"].keys()
    built = build_all(worker, group, node, settings.max_shape, unwanted)
    for backend_id, backend, reason in built:
        if backend is None:
            worker.emit("excluded", backend=backend_id, reason=reason)
        else:
            backends.append(backend)
    grid = [
        shape
        for hidden_size in settings.hidden_sizes
        for shape in size_grid(settings.min_bytes, settings.max_bytes, hidden_size, settings.dtype)
    ]
    rows: list[Any] = []
    arena = Arena(group, settings.max_shape)
    for i, shape in enumerate(grid):
        worker.emit("progress", done=i, planned=len(grid), op="bench", shape=str(shape))
        buffers = Buffers(arena, shape)
        for op in reversed(OPERATIONS):
            rows += _bench_point(worker, backends, op, buffers, settings.rounds)
    for backend in backends:
        backend.close()
    return rows


def _bench_point(
    worker: Worker, backends: Sequence[Backend], op: Op, buffers: Buffers, rounds: int
) -> list[Any]:
    group, shape, runners, wrong = backends[0].group, buffers.shape, [], {}
    for backend in taking(worker, backends, op, shape):
        mine = check(backend, group, usual(op, shape, shape.num_tokens)).wrong
        runner = Runner(backend, op, buffers)
        wrong[runner.path] = max(group.gather("wrong", mine))
        runners.append(runner)
    worker.phase(f"time {op} {shape}")
    samples = measured(group, runners, op, shape, rounds)
    return [[sample.model_dump(mode="json"), wrong[sample.path]] for sample in samples]
