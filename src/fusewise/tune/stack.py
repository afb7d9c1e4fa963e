"""Is the stack right here? Every backend at every dtype and width, eager and in a CUDA graph.

One rank's part of ``fusewise verify``, inside a killable child. Takes no time of anything: many
calls run before the device is waited for, so that ranks that share a GPU need few turns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from fusewise.backends.registry import ids_for, select
from fusewise.errors import UnavailableError
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.shape import DType, Shape
from fusewise.tune.candidates import BUILD_S, build_all, offered
from fusewise.tune.operands import Case, Operands, operands
from fusewise.tune.stack_grid import StackGrid
from fusewise.tune.timing import captured, graphs_hold, synchronise
from fusewise.tune.verify import call, judge, poisoned_memory, read, verdict

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.base import Backend
    from fusewise.ranks.worker import Worker

Called = tuple[Case, Operands, "Tensor", tuple["Tensor", ...]]


@dataclass
class Row:
    """What was found about one backend.

    ``verdict`` is ``pass``, ``fail`` or ``not here``; ``relative_error`` the largest L2 error
    against float64, in units of the dtype's eps.
    """

    backend: str
    verdict: str = "pass"
    eager_cases: int = 0
    captured_cases: int = 0
    refused_cases: int = 0
    relative_error_eps: float = 0.0
    first_failure: str | None = None
    reason: str | None = None

    def fail(self, case: str, reason: str) -> None:
        """The first failing case stays."""
        if self.verdict != "fail":
            self.verdict, self.first_failure, self.reason = "fail", case, reason


@dataclass
class Stack:
    """One rank's state of a verification."""

    worker: Worker
    group: Group
    grid: StackGrid
    rows: dict[str, Row] = field(default_factory=dict)
    done: int = 0


def verify_rank(worker: Worker, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The job: a row per backend, the same on all ranks."""
    grid = StackGrid(**request["settings"])
    group = Group(device=worker.device, timeout_s=grid.timeout_s)
    node = fingerprint_of(group)
    wanted = [i for i in ids_for(node.kind) if i in (select(grid.only) or ids_for(node.kind))]
    stack = Stack(worker, group, grid, {name: Row(name) for name in wanted})
    for backend_id, reason in request["excluded"].items():
        stack.rows[backend_id].fail("see the reason", reason)
    # Kernels that mark empty slots by a word of the dtype are built anew for another word's width.
    for _, dtypes in groupby(grid.dtypes, key=lambda dtype: dtype == "float32"):
        _verify_dtypes(stack, node, tuple(dtypes))
    return [asdict(row) for row in stack.rows.values()]


def _verify_dtypes(stack: Stack, node: Any, dtypes: tuple[DType, ...]) -> None:
    rows = stack.rows
    skipped = {name for name, row in rows.items() if row.verdict != "pass"}
    unwanted = set(ids_for(node.kind)) - rows.keys() | skipped
    largest = stack.grid.max_shape(dtypes[0])
    for backend_id, backend, why in build_all(stack.worker, stack.group, node, largest, unwanted):
        row = rows[backend_id]
        if backend is None:
            row.verdict, row.reason = "not here", why
            if why.startswith(f"{backend_id}: build") and UnavailableError.__name__ not in why:
                row.verdict, row.first_failure = "fail", "building it"
            continue
        try:
            for dtype in dtypes:
                for hidden_size in stack.grid.hidden_sizes:
                    _verify_width(stack, backend, row, dtype, hidden_size)
        finally:
            stack.worker.phase(f"close {backend_id}", backend_id)
            backend.close()


def _verify_width(stack: Stack, backend: Backend, row: Row, dtype: DType, hidden_size: int) -> None:
    """All cases of one dtype and hidden size: eagerly, then the same calls as one CUDA graph."""
    if row.verdict == "fail":
        return
    asked = stack.grid.cases(dtype, hidden_size, offered(backend))
    cases = [case for case in asked if _takes(backend, case)]
    row.refused_cases += len(asked) - len(cases)
    shape = Shape(max(stack.grid.tokens), hidden_size, dtype)
    widths = len(stack.grid.dtypes) * len(stack.grid.hidden_sizes)
    stack.worker.emit(
        "progress", done=stack.done, planned=widths * len(stack.rows), op=backend.id,
        shape=str(shape),
    )  # fmt: skip
    stack.done += 1
    stack.worker.phase(f"{backend.id} {dtype} hidden {hidden_size}", backend.id, BUILD_S)
    if not cases:
        return
    eager, error = [], None
    try:
        eager = _eager(backend, cases)
    except Exception as fault:  # the provider's border: whatever it raised, the peers must hear it
        error = fault
    if _settle(stack, row, "eager", eager, error):
        return
    row.eager_cases += len(cases)
    if not graphs_hold(backend):
        return
    replayed: list[Called] = []
    try:
        replayed = _captured(backend, eager)
    except Exception as fault:  # as above
        error = fault
    if not _settle(stack, row, "captured", replayed, error):
        row.captured_cases += len(cases)


def _takes(backend: Backend, case: Case) -> bool:
    able = backend.takes_no_residual or case.with_residual or case.op == "all_reduce"
    biased = backend.takes_weight_bias or not case.weight_bias
    return able and biased and backend.admits(case.shape) is None


def _eager(backend: Backend, cases: list[Case]) -> list[Called]:
    group, called = backend.group, []
    for case in cases:
        given = operands(case, group.world_size, group.device)
        x = given.inputs[group.rank].clone()
        with poisoned_memory():
            called.append((case, given, x, call(backend, case, given, x)))
    synchronise(group.device)
    backend.check()
    return called


def _captured(backend: Backend, eager: list[Called]) -> list[Called]:
    """The same calls one after the other in a graph, replayed over poisoned results."""
    results: list[tuple[Tensor, ...]] = []

    def one(i: int) -> None:
        case, given, x, _ = eager[i]
        results.append(call(backend, case, given, x))

    replay = captured(backend, one, len(eager), warm=0)
    for result in results:
        for tensor in result:
            tensor.fill_(float("nan"))
    replay()
    torch.cuda.synchronize(backend.group.device)
    backend.check()
    return [(*one[:3], result) for one, result in zip(eager, results, strict=True)]


def _settle(
    stack: Stack, row: Row, how: str, called: list[Called], error: Exception | None
) -> bool:
    """Whether it failed on any rank; the row is the same on all."""
    group = stack.group
    failed = group.vote(f"{row.backend} {how}", error)
    if failed:
        row.fail(how, failed)
        return True
    checks = read([judge(*one[:2], one[3], one[2], group.rank) for one in called])
    everyone = group.gather(f"{row.backend} {how}: checked", [asdict(check) for check in checks])
    wrong = verdict(everyone, group.ranks)
    if wrong:
        row.fail(f"{how}: {called[wrong[0]][0]}", wrong[1])
        return True
    for (case, *_), check in zip(called, checks, strict=True):
        eps = torch.finfo(getattr(torch, case.shape.dtype)).eps
        row.relative_error_eps = max(row.relative_error_eps, check.relative_error / eps)
    return False
