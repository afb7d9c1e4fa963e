"""The benchmark as one rank runs it: every path at every size, with the count of wrong elements.

Unlike a tune it leaves nothing out for being wrong: it shows the number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusewise.backends.registry import ids_for, select
from fusewise.backends.steps import build_backend
from fusewise.operation import Op
from fusewise.profiles.schema import Sample
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.shape import Shape, size_grid
from fusewise.tune.settings import Settings
from fusewise.tune.timing import Arena, Buffers, Runner, interleave
from fusewise.tune.verify import check_all_reduce, check_all_reduce_rms_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewise.backends.base import Backend
    from fusewise.ranks.worker import Worker

_OPS: tuple[Op, ...] = ("all_reduce", "all_reduce_rms_norm")
_BUILD_S = 300.0  # as in job.py


def bench_rank(worker: Worker, request: dict[str, Any]) -> list[Any]:
    """The job: [sample, wrong elements] per path, shape and operation, on every rank."""
    settings = Settings(**request["settings"])
    group = Group(timeout_s=settings.timeout_s)
    node = fingerprint_of(group)
    backends: list[Backend] = []
    for backend_id in ids_for(node.device_type):
        if backend_id in select(settings.without) or backend_id in request["excluded"]:
            continue
        worker.phase(f"build {backend_id}", backend_id, _BUILD_S)
        backend, reason = build_backend(backend_id, group, node, settings.max_shape)
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
        for op in _OPS:
            rows += _bench_point(worker, backends, op, shape, buffers, settings.rounds)
    for backend in backends:
        backend.close()
    return rows


def _bench_point(
    worker: Worker,
    backends: Sequence[Backend],
    op: Op,
    shape: Shape,
    buffers: Buffers,
    rounds: int,
) -> list[Any]:
    group, runners, wrong = backends[0].group, [], {}
    for backend in backends:
        if backend.admits(shape) is not None or (op == "all_reduce" and not backend.plain):
            continue
        worker.phase(f"{backend.id} {op} {shape}", backend.id)
        check = check_all_reduce if op == "all_reduce" else check_all_reduce_rms_norm
        mine = check(backend, group, shape, shape.num_tokens).wrong
        runner = Runner(backend, op, buffers)
        wrong[runner.path] = max(group.gather("wrong", mine))
        runners.append(runner)
    worker.phase(f"time {op} {shape}")
    return [
        [
            Sample(
                op=op, path=path, num_tokens=shape.num_tokens, hidden_size=shape.hidden_size,
                times_us=times_us,
            ).model_dump(mode="json"),
            wrong[path],
        ]
        for path, times_us in interleave(group, runners, rounds).items()
    ]  # fmt: skip
