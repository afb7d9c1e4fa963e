"""Steps of a backend's construction that all ranks survive together, or none.

A rank that fails alone must not leave its peers in the collective that comes next, so every local
step ends in a vote. Knows no provider.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from fusewise.backends.registry import backend_class
from fusewise.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fusewise.backends.base import Backend
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

T = TypeVar("T")
PTRACE_HINT = "In a container, exchanging memory handles needs --cap-add=SYS_PTRACE; or use nccl."


def build_backend(
    backend_id: str, group: Group, node: Fingerprint, max_shape: Shape
) -> tuple[Backend | None, str]:
    """A backend on all ranks, or None on all with the reason and the rank that failed."""
    kind = backend_class(backend_id)
    reason = kind.available(node)
    unavailable = group.vote(f"{backend_id}: available", reason)
    if unavailable:
        return None, reason or unavailable
    backend, error = None, None
    try:
        backend = kind(group, max_shape)
    except Exception as fault:  # a provider's border: whatever it raised, the peers must hear it
        error = fault
    failed = group.vote(f"{backend_id}: build", error)
    if failed and backend is not None:
        backend.close()
    return (None, failed) if failed else (backend, "")


def together(
    group: Group,
    phase: str,
    step: Callable[[], T],
    hint: str | None = None,
    kind: type[UnavailableError] = UnavailableError,
) -> T:
    """What ``step`` returns, once it has returned on every rank.

    Args:
        group: the ranks; all of them call this with the same phase.
        phase: the words an error uses, such as ``"custom: allocate"``.
        step: local work, or a collective whose own entry cannot fail on one rank only.
        hint: what the reader can do if it fails.
        kind: of the error; ``WorkspaceError`` where memory is shared.

    Raises:
        UnavailableError (``kind``): on every rank, naming the rank that failed and its error.
        RankTimeoutError: a rank never came back from its step.
    """
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(step())
    except Exception as fault:  # the provider's border: whatever it raised, the peers must hear it
        error = fault
    failed = group.vote(phase, error)
    if failed or not result:
        raise kind("the backend cannot be built", got=failed, hint=hint) from error
    return result[0]


def rendezvous(buffer: Tensor, group: Group) -> Any:
    """torch's exchange of memory handles, a step for ``together``: every rank maps all buffers."""
    from torch.distributed import _symmetric_memory

    with group.bounded_store():
        return _symmetric_memory.rendezvous(buffer, group.process_group)


def not_on_one_host(nodes: int, world_size: int) -> str | None:
    """The reason why a backend over peer memory cannot serve these ranks; None if it can."""
    if world_size < 2:
        return "one rank has no peer; nothing is to be reduced"
    if nodes > 1:
        return "ranks are on several hosts and peer memory reaches one; use nccl across hosts"
    return None
