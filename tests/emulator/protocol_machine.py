"""Runs a programme of `protocol` under one random schedule and checks every word on the way.

Never sleeps and keeps no objects in its loop: a hundred thousand schedules fit into a test.

A schedule is: who runs next and for how long, which stores land and in which order, which ranks
are slow, whether the links favour the newest stores. All of it comes from one random generator,
so a seed is a counterexample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.emulator.protocol import (
    END,
    LOAD,
    RESTORE,
    SENTINEL,
    START,
    VALUE_BITS,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from tests.emulator.protocol import Programme

_MASK = (1 << VALUE_BITS) - 1


@dataclass(frozen=True)
class Missing:
    """What a bounded poll reports: ``rank`` waited for the words of ``source``."""

    rank: int
    unit: int
    phase: int
    source: int


@dataclass(frozen=True)
class Outcome:
    """How one schedule went.

    ``fault`` is None if no word was read stale, overwritten unread or left behind, and every
    worker ended. ``finished`` holds the ranks all of whose workers completed the programme.
    """

    fault: str | None
    missing: tuple[Missing, ...] = ()
    finished: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Schedule:
    """The temper of one schedule, drawn once."""

    land: float  # chance that a turn lands stores
    salvo: int  # how many land at once
    newest: float  # chance that one of them is the newest in flight
    burst: int  # the most steps one worker makes in a turn
    wheel: list[int]  # workers as often as they are likely to be picked

    @classmethod
    def drawn(
        cls, programme: Programme, alive: list[int], random: Callable[[], float]
    ) -> _Schedule:
        ranks, workers = programme.layout.world_size, programme.workers
        speeds = [(1, 1, 12)[int(random() * 3)] for _ in range(ranks)]
        return cls(
            land=(0.03, 0.3, 0.8)[int(random() * 3)],
            salvo=(1, 3, 9)[int(random() * 3)],
            newest=(0.0, 0.0, 0.9)[int(random() * 3)],
            burst=(2, 6, 200)[int(random() * 3)],
            wheel=[w for w in alive for _ in range(speeds[w // workers])],
        )


def run(programme: Programme, rng: Random, poll_bound: int | None = None) -> Outcome:
    """Executes the programme once.

    Args:
        programme: from `protocol.build`.
        rng: decides everything that the machine leaves open.
        poll_bound: fruitless polls in a row after which a worker reports and its rank stops;
            None polls for ever, and then a state in which nothing can move is a fault.
    """
    machine = _Machine(programme)
    random = rng.random
    schedule = _Schedule.drawn(programme, machine.alive, random)
    land, salvo, newest = schedule.land, schedule.salvo, schedule.newest
    burst, wheel = schedule.burst, schedule.wheel
    flying, alive, at, steps = machine.flying, machine.alive, machine.at, programme.steps
    idle = 0  # turns in a row in which nothing moved; while they last, workers take turns
    while alive and machine.fault is None:
        if flying and random() < (0.5 if idle else land):
            machine.land(min(salvo, len(flying)), newest, random)
            idle = 0
            continue
        worker = alive[idle % len(alive)] if idle else wheel[int(random() * len(wheel))]
        if machine.turn(worker, 1 + int(random() * burst)):
            idle = 0
            if at[worker] == len(steps[worker]):
                alive.remove(worker)
                wheel = [w for w in wheel if w != worker]
            continue
        idle += 1
        if poll_bound is None:
            if idle > len(alive) and not flying:
                return Outcome(f"stuck: worker {worker} waits at step {at[worker]} for ever")
        elif machine.gives_up(worker, poll_bound):
            alive.remove(worker)
            wheel = [w for w in wheel if w != worker]
    if machine.fault is None:
        machine.land(len(flying), newest, random)
    return machine.outcome()


class _Machine:
    """N buffers, the stores in flight, and where each worker stands."""

    def __init__(self, programme: Programme) -> None:
        self.programme = programme
        ranks = programme.layout.world_size
        self.rank_words = programme.layout.rank_words
        self.memory = [SENTINEL] * (ranks * self.rank_words)
        self.flying: list[int] = []
        self.alive = [w for w, steps in enumerate(programme.steps) if steps]
        self.at = [0] * len(programme.steps)
        self.polls = [0] * len(programme.steps)
        self.arrived, self.undrained = [0] * ranks, [0] * ranks
        self.stopped = {programme.dead_rank}
        self.missing: list[Missing] = []
        self.fault: str | None = None

    def land(self, count: int, newest: float, random: Callable[[], float]) -> None:
        """Stores in flight become visible; none may hide what nobody has read."""
        flying, memory = self.flying, self.memory
        for _ in range(count):
            which = -1 if random() < newest else int(random() * len(flying))
            store, flying[which] = flying[which], flying[-1]
            flying.pop()
            address, old, new = store >> 2 * VALUE_BITS, store >> VALUE_BITS & _MASK, store & _MASK
            if memory[address] != old:
                self.fault = f"{self.name(address)} is overwritten"
            memory[address] = new
            if old != SENTINEL == new:
                self.undrained[address // self.rank_words] -= 1

    def turn(self, worker: int, count: int) -> bool:
        """At most ``count`` steps of a worker; False if it could not make one."""
        memory, flying, before = self.memory, self.flying, self.at[worker]
        rank = worker // self.programme.workers
        done = before
        for kind, address, value in self.programme.steps[worker][before : before + count]:
            if kind <= RESTORE:
                flying.append(value)
                if kind == RESTORE:
                    self.undrained[rank] += 1
            elif kind == START:
                if self.arrived[rank] < value or (self.programme.drains and self.undrained[rank]):
                    break
            elif kind == END:
                self.arrived[rank] += 1
            elif (seen := memory[address]) != value:
                if kind == LOAD or seen != SENTINEL:
                    self.fault = (
                        f"{self.name(address)} is read {'half' if kind == LOAD else 'stale'}"
                    )
                break
            done += 1
        self.at[worker] = done
        return done > before

    def gives_up(self, worker: int, poll_bound: int) -> bool:
        """A fruitless turn under a bound: report when it is reached, leave when the rank stops."""
        self.polls[worker] += 1
        rank = worker // self.programme.workers
        kind, address, _ = self.programme.steps[worker][self.at[worker]]
        if rank not in self.stopped and kind != START and self.polls[worker] > poll_bound:
            self.missing.append(Missing(rank, *self.programme.layout.owner(address)))
            self.stopped.add(rank)
        return rank in self.stopped

    def name(self, address: int) -> str:
        unit, phase, source = self.programme.layout.owner(address)
        rank, word = divmod(address, self.programme.layout.rank_words)
        return f"rank {rank}, unit {unit}, phase {phase}, source {source}, word {word}"

    def outcome(self) -> Outcome:
        """After the last store landed: every slot must hold the sentinel again."""
        layout, workers = self.programme.layout, self.programme.workers
        ended = [at == len(s) for at, s in zip(self.at, self.programme.steps, strict=True)]
        finished = {
            rank for rank in range(layout.world_size)
            if rank not in self.stopped and all(ended[rank * workers : (rank + 1) * workers])
        }  # fmt: skip
        if self.fault is None and len(finished) == layout.world_size:
            left = [a for a, word in enumerate(self.memory) if word != SENTINEL]
            self.fault = f"{self.name(left[0])} is left behind" if left else None
        return Outcome(self.fault, tuple(self.missing), frozenset(finished))
