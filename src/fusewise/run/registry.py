"""Which communicator a name in a graph means.

A name is a process group's (``"0"``: the one activated last and still open) or a handle
(``"0#1"``: one communicator, and no other while it lives). Keeps nothing alive.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from fusewise.errors import UnavailableError

if TYPE_CHECKING:
    from fusewise.run.communicator import Communicator

_MARK = "#"  # between a group's name and the number that tells its communicators apart

# Not a WeakValueDictionary, which looks up in Python, at every call of an operator.
_by_name: dict[str, weakref.ref[Communicator]] = {}
_turns: dict[str, list[weakref.ref[Communicator]]] = {}  # by group, the active one last


def new_handle(communicator: Communicator) -> str:
    """Registers a communicator under the lowest free handle of its group, and activates it.

    A rank may drop one later than its peers do: numbers need not be equal on all ranks, and no
    rank looks at another's. A process that starts again finds the same numbers, so that a graph
    kept on disk still names its communicator.
    """
    number = 1
    while _alive(f"{communicator.group.name}{_MARK}{number}"):
        number += 1
    handle = f"{communicator.group.name}{_MARK}{number}"
    _by_name[handle] = weakref.ref(communicator)
    activate(communicator)
    return handle


def activate(communicator: Communicator) -> None:
    """Makes it the one that the group's name means."""
    name = communicator.group.name
    _turns[name] = [*_others(communicator), weakref.ref(communicator)]
    _by_name[name] = weakref.ref(communicator)


def retire(communicator: Communicator) -> None:
    """Forgets it; the group's name means the one before again."""
    for name in [name for name, known in _by_name.items() if known() in (None, communicator)]:
        del _by_name[name]
    _turns[communicator.group.name] = _others(communicator)


def _alive(name: str) -> bool:
    known = _by_name.get(name)
    return known is not None and known() is not None


def _others(communicator: Communicator) -> list[weakref.ref[Communicator]]:
    turns = _turns.get(communicator.group.name, [])
    return [turn for turn in turns if turn() not in (None, communicator)]


def communicator_for(name: str) -> Communicator:
    """The open communicator of a handle or of a torch process group's name.

    A handle whose communicator is gone means its group's active one: exported programs and
    graphs from a cache outlive the process that made them.

    Raises:
        UnavailableError: none is open for that group.
    """
    known = _by_name.get(name)
    if known is not None and (found := known()) is not None:
        return found
    for turn in reversed(_turns.get(name.rpartition(_MARK)[0] or name, [])):
        latest = turn()
        if latest is not None:
            return latest
    raise UnavailableError(
        f"no communicator for process group {name!r}",
        got=f"communicators for {sorted(filter(_alive, _by_name))}",
        hint="Create fusewise.Communicator(group) before running the compiled model.",
    )
