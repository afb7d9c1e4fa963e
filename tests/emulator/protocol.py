"""The push protocol of our kernels, written out word by word.

What every worker (CTA) of every rank stores, polls and restores, in which order; nothing here
runs on a GPU, moves tensors or knows a clock. `protocol_machine` executes these programmes under
random schedules and checks the argument below.

**What moves.** Every rank owns a buffer that its peers write into. Rows fill whole *units* (the
kernels': 512 bytes); a slot belongs to one (phase, unit, source). A rank stores its row into its
slots at every peer (*push*), then polls its own buffer until each word differs from the sentinel,
and puts the sentinel back right after reading (*restore*). Each unit counts its own epochs, one
per call that uses it; the phase is the epoch modulo two. One-shot pushes whole rows. Two-shot
pushes to each owner that owner's columns; the owner pushes the reduced columns and, per row, the
partial Σr² to all, into slots of a single phase.

**What is assumed of the machine**, and nothing beyond it: an aligned word arrives whole; stores
to different words may become visible in any order, also within one 16-byte vector, and as late
as the links please, also after the kernel that issued them; a kernel's stores into its *own*
rank's memory are performed before any push of that rank's next kernel (stream order, or the
dependency wait under programmatic dependent launch); all ranks issue the same calls in the same
order.

**Why a word is never read stale.** Between two uses of a slot its reader put the sentinel back,
so a word that differs from the sentinel was stored by the push of this very epoch. That needs
each word looked at by itself (vectors arrive in pieces) and data that never equal the sentinel
(`encode`: the sentinel is one NaN pattern, and a NaN of that pattern is sent as another).

**Why two phases suffice.** Let A push epoch e+2 of a unit, into the slot that held its epoch e at
B. Each arrow is "happens before"::

    B reads and restores A's words of e  ->  B's kernel of e ends      (1: own memory, drained)
      ->  B's kernel of e+1 pushes this unit ->  A sees a word of it   (2: the data are the flag)
      ->  A's kernel of e+1 ends  ->  A's kernel of e+2 pushes         (3: stream order)

So the restore lands before the push that reuses the slot. With one phase A's push of e+1 would
overtake (1), having seen nothing of B that follows it. Pushing before the dependency wait breaks
(3); leaving a restore undrained breaks (1). Reduced columns and partial sums need one phase only:
an owner sends them after it took the scatter of the same call from all ranks, each of which sent
that after (1).

**Why neither address nor epoch may depend on the call's shape.** The chain holds per unit and
phase. A peer one call ahead pushes while this rank still holds unread words of the call before; if
the strides followed the number of tokens, or epochs were counted per row while a row's units
follow the hidden size, one call's words would land on another's. With fixed units calls of any
shape, and of both strategies, may follow each other.

**Why it ends.** Every worker pushes all its rows before it polls any, so nothing a peer waits for
stands behind a wait. A peer that died is found by the bound on polling: the waiting rank reports
(rank, unit, phase, source), stops, and pushes nothing more, so every other rank ends likewise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Strategy = Literal["one_shot", "two_shot"]
Mutation = Literal[
    "one_phase",  # epoch e+1 goes into the slots of e
    "shape_dependent_slots",  # strides follow the call instead of the workspace
    "epoch_per_row",  # rows count epochs, though their units depend on the call's width
    "last_word_only",  # a vector counts as arrived when its last word has
    "late_restore",  # restores may land after the next kernel's pushes
    "lost_restore",  # the last word of a vector is not restored
    "raw_sentinel",  # data equal to the sentinel are sent as they are
    "push_before_wait",  # pushes precede the dependency wait
    "poll_before_push",  # a worker polls its rows before it pushes them
    "early_gather",  # reduced columns leave before all of the scatter was taken
]
MUTATIONS: tuple[Mutation, ...] = get_args(Mutation)

SENTINEL = 0
SUBSTITUTE = 1  # what `encode` sends for data equal to the sentinel
VECTOR_WORDS = 2  # the kernels' vectors have four words; two are enough to arrive in halves
UNIT_WORDS = 4  # 128 in the kernels; four can be used in part, too
VALUE_BITS = 24  # stores are packed as address, old and new value; the machine unpacks them

STORE, RESTORE, POLL, LOAD, START, END = range(6)
_REDUCED, _PARTIAL = 2, 3  # phases of slots that have only one


@dataclass(frozen=True)
class Call:
    """One collective call: ``words`` 32-bit words per row.

    A multiple of ``VECTOR_WORDS``, and for two-shot of ``VECTOR_WORDS · world_size``.
    """

    strategy: Strategy
    num_tokens: int
    words: int

    def units_per_row(self, world_size: int) -> int:
        """Units that a row begins; two-shot: that one owner's columns of a row begin."""
        width = self.words // (world_size if self.strategy == "two_shot" else 1)
        return -(-width // UNIT_WORDS)


class Step(NamedTuple):
    """One instruction.

    ``STORE`` and ``RESTORE`` put the packed store ``value`` in flight; ``POLL`` waits until the
    word at ``address`` differs from the sentinel and must then find ``value``; ``LOAD`` must find
    it at once; ``START`` waits until ``value`` workers of the rank have passed ``END`` and the
    rank's restores have landed.
    """

    kind: int
    address: int
    value: int


@dataclass(frozen=True)
class Layout:
    """Word addresses of N buffers of one size, rank after rank."""

    world_size: int
    units: int

    @property
    def rank_words(self) -> int:
        """Words of one rank's buffer: two phases of pushed slots, reduced slots, partial sums."""
        return self.units * self.world_size * (3 * UNIT_WORDS + 1)

    def slot(self, rank: int, phase: int, unit: int, source: int) -> int:
        """Address of the first word of a slot in the buffer of ``rank``.

        Phases 0 and 1 hold what is pushed, 2 reduced columns, 3 partial sums (``unit``: the row).
        """
        width = 1 if phase == _PARTIAL else UNIT_WORDS
        region = phase * self.units * self.world_size * UNIT_WORDS
        return rank * self.rank_words + region + (unit * self.world_size + source) * width

    def owner(self, address: int) -> tuple[int, int, int]:
        """(unit, phase, source) of a word."""
        phase, inner = divmod(address % self.rank_words, self.units * self.world_size * UNIT_WORDS)
        unit, source = divmod(inner // (1 if phase == _PARTIAL else UNIT_WORDS), self.world_size)
        return unit, phase, source


@dataclass(frozen=True)
class Programme:
    """The steps of every worker; workers of one rank are neighbours."""

    layout: Layout
    workers: int  # per rank
    steps: tuple[tuple[Step, ...], ...]
    drains: bool = True
    dead_rank: int | None = None

    def killed(self, rank: int, cuts: Sequence[int]) -> Programme:
        """The same run in which the workers of ``rank`` die after ``cuts`` steps."""
        steps = list(self.steps)
        for worker, cut in enumerate(cuts, rank * self.workers):
            steps[worker] = steps[worker][:cut]
        return replace(self, steps=tuple(steps), dead_rank=rank)


def encode(word: int, mutation: Mutation | None = None) -> int:
    """What is sent for ``word``: never the sentinel."""
    return SUBSTITUTE if word == SENTINEL and mutation != "raw_sentinel" else word


def build(
    world_size: int, calls: Sequence[Call], workers: int = 2, mutation: Mutation | None = None
) -> Programme:
    """The programme of ``calls`` on ``world_size`` ranks with ``workers`` workers each."""
    layout = Layout(world_size, max(c.num_tokens * c.units_per_row(world_size) for c in calls))
    steps: list[list[Step]] = [[] for _ in range(world_size * workers)]
    epochs: Counter[int] = Counter()  # of units
    row_epochs: Counter[int] = Counter()
    for number, call in enumerate(calls):
        epochs.update(range(call.num_tokens * call.units_per_row(world_size)))
        row_epochs.update(range(call.num_tokens))
        writer = _Writer(layout, number, call, dict(epochs), dict(row_epochs), mutation)
        for rank in range(world_size):
            for worker in range(workers):
                # Which worker gets a row differs from rank to rank and from call to call.
                rows = range((worker - number * rank) % workers, call.num_tokens, workers)
                written = writer.kernel(rank, rows, arrivals=number * workers)
                steps[rank * workers + worker] += written
    return Programme(layout, workers, tuple(map(tuple, steps)), mutation != "late_restore")


@dataclass(frozen=True)
class _Writer:
    """Writes the steps of one call."""

    layout: Layout
    number: int
    call: Call
    epochs: dict[int, int]
    row_epochs: dict[int, int]
    mutation: Mutation | None

    def kernel(self, rank: int, rows: Sequence[int], arrivals: int) -> list[Step]:
        """One worker's kernel: wait for the one before, sweep its rows, arrive."""
        start, end = Step(START, 0, arrivals), Step(END, 0, 0)
        first, *sweeps = self.sweeps(rank, rows)
        rest = [step for sweep in sweeps for step in sweep]
        if self.mutation == "push_before_wait":
            return [*first, start, *rest, end]
        if self.mutation == "poll_before_push":
            return [start, *rest, *first, end]
        return [start, *first, *rest, end]

    def sweeps(self, rank: int, rows: Sequence[int]) -> list[list[Step]]:
        """Push everything; then poll. Two-shot: then push what was reduced; then poll that."""
        peers = [p for p in range(self.layout.world_size) if p != rank]
        if self.call.strategy == "one_shot":
            whole = range(self.call.words)
            return [
                [s for row in rows for p in peers for s in self.push(rank, p, row, whole)],
                [s for row in rows for p in peers for s in self.take(rank, p, row, whole)],
            ]
        width = self.call.words // self.layout.world_size
        columns = range(width)  # of each owner; slots and words count them from its first
        scatter: list[Step] = []
        reduce: list[Step] = []
        gather: list[Step] = []
        for row in rows:
            taken: list[Step] = []
            sent: list[Step] = []
            for peer in peers:
                scatter += self.push(rank, peer, row, columns)
                taken += self.take(rank, peer, row, columns)
                sent += self.push(rank, peer, row, columns, _REDUCED)
                sent += self.push(rank, peer, row, range(1), _PARTIAL)
                gather += self.take(rank, peer, row, columns, _REDUCED)
                gather += self.take(rank, peer, row, range(1), _PARTIAL)
            reduce += sent + taken if self.mutation == "early_gather" else taken + sent
        return [scatter, reduce, gather]

    def push(
        self, source: int, target: int, row: int, columns: range, phase: int | None = None
    ) -> Iterable[Step]:
        """``source`` stores its words into its slots at ``target``."""
        for column in columns:
            at = self.address(target, row, source, column, phase)
            word = encode(self.word(source, row, column, phase), self.mutation)
            yield self.store(STORE, at, SENTINEL, word)

    def take(
        self, rank: int, source: int, row: int, columns: range, phase: int | None = None
    ) -> Iterable[Step]:
        """``rank`` polls the slots of ``source`` in its own buffer, vector by vector."""
        words = [
            (
                self.address(rank, row, source, column, phase),
                encode(self.word(source, row, column, phase)),
            )
            for column in columns
        ]
        for first in columns[::VECTOR_WORDS]:
            vector = words[first : first + VECTOR_WORDS]
            polled = vector[-1:] if self.mutation == "last_word_only" else vector
            yield from (Step(POLL, *word) for word in polled)
            yield from (Step(LOAD, *word) for word in vector if word not in polled)
            restored = vector[:-1] if self.mutation == "lost_restore" else vector
            yield from (self.store(RESTORE, a, word, SENTINEL) for a, word in restored)

    def address(self, rank: int, row: int, source: int, column: int, phase: int | None) -> int:
        """Where ``rank`` receives a word; ``phase`` None: the one that the epoch says."""
        if phase == _PARTIAL:
            return self.layout.slot(rank, phase, row, source)
        unit = row * self.call.units_per_row(self.layout.world_size) + column // UNIT_WORDS
        if phase is None:
            epoch = self.row_epochs[row] if self.mutation == "epoch_per_row" else self.epochs[unit]
            phase = 0 if self.mutation == "one_phase" else epoch % 2
        place = self.layout.slot(rank, phase, unit, source)
        if self.mutation == "shape_dependent_slots" and phase == 1:
            used = self.call.num_tokens * self.call.units_per_row(self.layout.world_size)
            place -= (self.layout.units - used) * self.layout.world_size * UNIT_WORDS
        return place + column % UNIT_WORDS

    def word(self, source: int, row: int, column: int, phase: int | None) -> int:
        """The data: every word of a run is different, but each fifth equals the sentinel."""
        tag = self.number * 4 + (0 if phase is None else phase)
        widest = self.layout.units * UNIT_WORDS * self.layout.world_size
        for digit, base in ((source, self.layout.world_size), (row, self.layout.units),
                            (column, widest)):  # fmt: skip
            tag = tag * base + digit
        return SENTINEL if tag % 5 == 0 else tag + SUBSTITUTE + 1

    @staticmethod
    def store(kind: int, address: int, old: int, new: int) -> Step:
        """A store that must find ``old``: whatever else lies there was not to be overwritten."""
        return Step(kind, address, ((address << VALUE_BITS) + old << VALUE_BITS) + new)
