"""Starts ranks as killable children, or joins torchrun's; watches them; always reaps them.

A job runs in children only, so that a provider that spins or crashes takes its child with it and
never the caller. Under torchrun every torchrun rank supervises one child and the supervisors talk
over torchrun's own rendezvous; otherwise one supervisor has all children.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from fusewise.errors import RankError
from fusewise.ranks.nursery import Nursery
from fusewise.ranks.teams import Team
from fusewise.ranks.worker import STALL_S, START_S

_POLL_S = 0.2
_ECHO_S = 0.5  # a rank's death may be heard after the errors that it caused in its peers

Event = dict[str, Any]
OnEvent = Callable[[int, Event], None]


@dataclass(frozen=True)
class Failure:
    """Why a rank did not finish. ``backend`` is whose code ran, as far as the rank told."""

    rank: int
    kind: Literal["died", "stalled", "error", "stopped"]
    phase: str
    backend: str | None
    reason: str
    code: int = RankError.exit_code

    def __str__(self) -> str:
        return f"rank {self.rank} {self.reason} at {self.phase!r}"


@dataclass
class _Child:
    rank: int
    nursery: Nursery
    pid: int
    pipe: int
    deadline: float
    phase: str = "start"
    backend: str | None = None
    tail: bytes = b""
    result: Any = None
    failure: Failure | None = None
    done: bool = False
    ended: bool = False  # waited for

    def fail(self, kind: Literal["died", "stalled", "error", "stopped"], reason: str) -> None:
        """Marks the end of this rank; the first reason stays."""
        self.failure = self.failure or Failure(self.rank, kind, self.phase, self.backend, reason)
        self.done = True


@dataclass
class Outcome:
    """Every supervised rank's result, or the failure that ended the attempt."""

    results: dict[int, Any] = field(default_factory=dict)
    failure: Failure | None = None


def run_attempt(
    team: Team,
    job: str,
    request: dict[str, Any],
    on_event: OnEvent,
    nursery: Nursery,
    timeout_s: float = 120.0,
) -> Outcome:
    """Runs ``job`` ("module:function") once on every rank of the team.

    Returns as soon as all supervised ranks gave a result or one failed anywhere in the team; by
    then no child of this process is left.

    Args:
        team: who supervises whom.
        job: called as ``function(worker, request)`` in every child.
        request: JSON-like.
        on_event: called with (rank, event) for every event of a supervised rank.
        nursery: forks the ranks; it may serve further attempts.
        timeout_s: bound of every collective wait inside the children.

    Raises:
        RankError: the nursery is gone; supervisors of peers have been told.
    """
    with _rendezvous(team, nursery) as (store, host, port):
        children: list[_Child] = []
        gone: RankError | None = None
        try:
            for order in _orders(team, host, port):
                order |= {"job": job, "request": request, "timeout_s": timeout_s}
                children.append(_start(order, nursery))
            _watch(children, store, on_event)
        except RankError as error:
            gone = error
            if store is not None:
                store.set("failed", "1")
        finally:
            for child in children:
                _reap(child)
        failures = [child.failure for child in children if child.failure]
        if team.peers is not None:
            told = [vars(f) for f in failures]
            if gone is not None:
                told = [vars(Failure(team.ranks[0], "died", "start", None, "could not start"))]
            failures = [Failure(**f) for rank in team.peers.gather("attempt", told) for f in rank]
        if gone is not None:
            raise gone
    order_of = ("died", "stalled", "error", "stopped")
    worst = min(failures, key=lambda f: (order_of.index(f.kind), f.rank), default=None)
    return Outcome({child.rank: child.result for child in children}, worst)


@contextmanager
def _rendezvous(team: Team, nursery: Nursery) -> Iterator[tuple[Any, str, int]]:
    """A store of this attempt's own, on a free port: a dead child cannot take it along.

    Yields it, where several supervisors speak over it, with its address.
    """
    if team.peers is None:
        pid, port = nursery.keep_store(team.host)
        try:
            yield None, team.host, port
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            nursery.wait(pid, 20)
        return
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store, port = None, 0
    if team.leads:
        store = TCPStore(team.host, 0, is_master=True, wait_for_workers=False)
        port = int(store.port)
    port = team.peers.broadcast("rendezvous", port)
    yield store or TCPStore(team.host, port, is_master=False), team.host, port


def _orders(team: Team, host: str, port: int) -> Iterator[dict[str, Any]]:
    """What every rank started here is told of its place."""
    environment = dict(team.place.environment)
    if host == "127.0.0.1" and "GLOO_SOCKET_IFNAME" not in os.environ:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    for rank, local_rank in zip(team.ranks, team.local_ranks, strict=True):
        yield {
            "rank": rank, "local_rank": local_rank, "world_size": team.world_size,
            "device": team.place.device(local_rank), "process_group": team.place.process_group,
            "store": [host, port], "threads": _threads_per_rank(team), "environment": environment,
        }  # fmt: skip


def _threads_per_rank(team: Team) -> int:
    return max(1, (os.cpu_count() or 1) // max(1, len(team.ranks)))


def _start(order: dict[str, Any], nursery: Nursery) -> _Child:
    receiver, sender = os.pipe()
    os.set_blocking(receiver, False)
    try:
        pid = nursery.fork(order, sender)
    except BaseException:
        os.close(receiver)
        raise
    finally:
        os.close(sender)
    return _Child(order["rank"], nursery, pid, receiver, time.monotonic() + START_S)


def _watch(children: list[_Child], store: Any, on_event: OnEvent) -> None:
    """Until every child is done or one failed here or elsewhere."""
    stop_at = math.inf
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        while not all(child.done for child in children):
            for key, _ in selector.select(_POLL_S):
                child = key.data
                if not _read_events(child, on_event):
                    selector.unregister(child.pipe)
            now = time.monotonic()
            for child in children:
                if not child.done and now > child.deadline:
                    child.fail("stalled", "made no progress in time")
            failures = [child.failure for child in children if child.failure]
            if failures and store is not None:
                store.set("failed", "1")
            if failures or (store is not None and store.check(["failed"])):
                patience_s = 0.0 if any(f.kind != "error" for f in failures) else _ECHO_S
                stop_at = min(stop_at, now + patience_s)
            if now >= stop_at:
                for child in children:
                    if not child.done:
                        child.fail("stopped", "was stopped because a peer failed")


def _read_events(child: _Child, on_event: OnEvent) -> bool:
    """Handles what arrived; False once the pipe is closed."""
    chunk = os.read(child.pipe, 1 << 20)
    if not chunk:
        if not child.done:
            child.fail("died", _how_it_ended(child))
        return False
    *lines, child.tail = (child.tail + chunk).split(b"\n")
    for line in lines:
        event = json.loads(line)
        child.deadline = time.monotonic() + event.get("allow_s", STALL_S)
        if event["kind"] == "phase":
            child.phase, child.backend = event["text"], event["backend"]
        elif event["kind"] == "result":
            child.result, child.done = event["value"], True
        elif event["kind"] == "error":
            child.failure = Failure(
                child.rank, "error", child.phase, child.backend,
                f"failed with {event['text']}", event["code"],
            )  # fmt: skip
            child.done = True
        on_event(child.rank, event)
    return True


def _how_it_ended(child: _Child) -> str:
    code = child.nursery.wait(child.pid, 5)
    if code is None:
        return "closed its pipe"
    child.ended = True
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with {code}"


def _reap(child: _Child) -> None:
    """No child and no grandchild survives this."""
    if child.done and child.failure is None:
        # Lets it give back what it holds.
        child.ended = child.nursery.wait(child.pid, 20) is not None
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if not child.ended:
        child.nursery.wait(child.pid, 20)
    os.close(child.pipe)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, so that torchrun's stop also reaps children."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
