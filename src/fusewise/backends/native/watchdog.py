"""The dead are seen, in replays of CUDA graphs too: one thread looks at all open backends' words.

A kernel that waited in vain writes who, where and for whom into host memory. Calls look there by
themselves, replays do not pass through Python. One thread per process, started with the first
backend and gone with the last, looks four times a second, logs the fact once and tells those who
asked. It launches nothing, frees nothing, and costs a call nothing.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fusewise.backends.native.cuda.params import Status
from fusewise.errors import InputError, RankTimeoutError

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.ranks.group import Group

log = logging.getLogger("fusewise")

REPLAY_TIMEOUT = "FUSEWISE_REPLAY_TIMEOUT_S"
# Ranks replay in step, so seconds are an age; but a rank that compiles something between two
# replays must not end a healthy group. Eager calls have the group's own bound.
_REPLAY_TIMEOUT_S = 20.0
LOOK_S = 0.25  # between two looks
_PHASES = ("the peers' rows", "the peers' rows", "the reduced columns", "the partial sums")

Listener = Callable[[RankTimeoutError], None]


def replay_timeout_s(group_timeout_s: float, environ: Mapping[str, str] = os.environ) -> float:
    """Bound of a wait in a captured call: ``FUSEWISE_REPLAY_TIMEOUT_S``, at most the group's.

    Raises:
        InputError: the variable is no positive number.
    """
    text = environ.get(REPLAY_TIMEOUT) or str(_REPLAY_TIMEOUT_S)
    try:
        bound_s = float(text)
    except ValueError:
        bound_s = 0.0
    if not 0.0 < bound_s < float("inf"):
        raise InputError(REPLAY_TIMEOUT, expected="seconds, more than 0", got=repr(text))
    return min(bound_s, group_timeout_s)


class Pulse:
    """The words in which one backend's kernels say that they waited in vain; watched until closed.

    Args:
        label: the backend's id, for messages.
        group: the ranks.
        page: the words of a ``Status``, in host memory that the device writes.
    """

    def __init__(self, label: str, group: Group, page: Tensor) -> None:
        self._label, self._group = label, group
        self._page = page  # keeps the memory
        self.status = Status.from_address(page.data_ptr())
        self.replay_timeout_s = replay_timeout_s(group.timeout_s)
        self._listeners: list[Callable[[], Listener | None]] = []
        self._told = False
        _watchdog.add(self)

    def check(self) -> None:
        """Raises if a kernel of this rank waited in vain; reads one host word, waits for nothing.

        Raises:
            RankTimeoutError: names the rank that waited, the row, the phase and the missing peer.
        """
        if self.status.state:
            raise self._error()

    def on_death(self, tell: Listener) -> None:
        """Calls ``tell`` once with the error, from the watchdog's thread. Keeps no object alive
        whose bound method it is."""
        bound = inspect.ismethod(tell)
        self._listeners.append(weakref.WeakMethod(tell) if bound else lambda: tell)

    def look(self) -> None:
        """The watchdog's look."""
        if self._told or not self.status.state:
            return
        self._told = True
        error = self._error()
        log.error("%s", error)
        for listener in self._listeners:
            tell = listener()
            if tell is not None:
                tell(error)

    def close(self) -> None:
        """Nobody looks any more. Safe to call twice."""
        _watchdog.remove(self)

    def _error(self) -> RankTimeoutError:
        status, group = self.status, self._group
        return RankTimeoutError(
            f"{self._label} of {group} is dead",
            expected=f"{_PHASES[status.phase]} within {group.timeout_s:g} s, "
            f"in a graph {self.replay_timeout_s:g} s",
            got=f"rank {group.ranks[status.rank]} waited at row {status.row} "
            f"for rank {group.ranks[status.peer]} (phase {status.phase})",
            hint="Results since then are NaN. Every rank must make the same calls in the same "
            "order; see the missing rank's own output, then build a new communicator.",
        )


class Watchdog:
    """The thread and the pulses it looks at; a pulse that is dropped unclosed is forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pulses: weakref.WeakSet[Pulse] = weakref.WeakSet()
        self._wake = threading.Event()
        self.thread: threading.Thread | None = None

    def add(self, pulse: Pulse) -> None:
        """Looks at it from now on."""
        with self._lock:
            self._pulses.add(pulse)
            if self.thread is None:
                self.thread = threading.Thread(
                    target=self._watch, name="fusewise-watchdog", daemon=True
                )
                self.thread.start()

    def remove(self, pulse: Pulse) -> None:
        """Forgets it; the thread ends with the last one, at once."""
        with self._lock:
            self._pulses.discard(pulse)
            if not self._pulses:
                self._wake.set()

    def _watch(self) -> None:
        while self._look():
            self._wake.wait(LOOK_S)

    def _look(self) -> bool:
        """One look at every pulse; False, and no thread any more, where there is none."""
        with self._lock:
            self._wake.clear()
            pulses = list(self._pulses)
            if not pulses:
                self.thread = None
                return False
        for pulse in pulses:
            try:
                pulse.look()
            except Exception:  # a listener's: the others must still be told
                log.exception("fusewise's watchdog")
        return True


_watchdog = Watchdog()
# A forked child has neither the thread nor the device: it begins with an empty watchdog of its own.
os.register_at_fork(after_in_child=_watchdog.__init__)  # type: ignore[misc]
