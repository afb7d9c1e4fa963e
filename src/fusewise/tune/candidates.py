"""What a tune, a benchmark and a verification run over: every backend that can be built here.

Each step names the backend whose code runs, so that the supervisor can tell whose fault a silence
is. Times and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fusewise.backends.registry import ids_for
from fusewise.backends.steps import build_backend
from fusewise.operation import OPERATIONS, Op

if TYPE_CHECKING:
    from collections.abc import Collection

    from fusewise.backends.base import Backend
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.ranks.worker import Worker
    from fusewise.shape import Shape

BUILD_S = 300.0  # a provider may compile its kernels at first use
STEP_S = 45.0


def build_all(
    worker: Worker, group: Group, node: Fingerprint, max_shape: Shape, excluded: Collection[str]
) -> Iterator[tuple[str, Backend | None, str]]:
    """Builds one backend after the other, the baseline first, but for those left out. Collective.

    Yields:
        Its id; the backend, or None on all ranks; then the reason why it is None.
    """
    for backend_id in ids_for(node.kind):
        if backend_id in excluded:
            continue
        worker.phase(f"build {backend_id}", backend_id, BUILD_S)
        yield backend_id, *build_backend(backend_id, group, node, max_shape)


def offered(backend: Backend) -> list[Op]:
    """The operations a backend can be asked for."""
    return [op for op, one in OPERATIONS.items() if one.fusable or backend.plain]


def taking(worker: Worker, backends: Iterable[Backend], op: Op, shape: Shape) -> Iterator[Backend]:
    """The backends that take an operation at a shape, each announced as what runs next."""
    for backend in list(backends):
        if op in offered(backend) and backend.admits(shape) is None:
            worker.phase(f"{backend.id} {op} {shape}", backend.id, STEP_S)
            yield backend
