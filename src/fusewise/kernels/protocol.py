"""The push protocol of our kernels, written out word by word.

What every worker (CTA) of every rank stores, polls and restores, in which order; nothing here
runs on a GPU, moves tensors or knows a clock. `protocol_machine` executes these programmes under
random schedules and checks the argument below.

**What moves.** Every rank owns a buffer that its peers write into. A slot of it belongs to one
(phase, row, source) and is as wide as the widest row. A rank stores its row into its slot at
every peer (*push*), then polls its own buffer until each word differs from the sentinel, and
puts the sentinel back right after reading (*restore*). Each row counts its own epochs, one per
call that has this row; the phase is the epoch modulo two. One-shot pushes whole rows. Two-shot
pushes to each owner that owner's columns; the owner pushes the reduced columns and one 8-byte
word {partial Σr², epoch} to all. That word is told from an old one by its epoch and needs no
restore.

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

**Why two phases suffice.** Let A push epoch e+2 of a row, into the slot that held its epoch e at
B. Each arrow is "happens before"::

    B reads and restores A's words of e  ->  B's kernel of e ends      (1: own memory, drained)
      ->  B's kernel of e+1 pushes this row  ->  A sees a word of it   (2: the data are the flag)
      ->  A's kernel of e+1 ends  ->  A's kernel of e+2 pushes         (3: stream order)

So the restore lands before the push that reuses the slot. With one phase A's push of e+1 would
overtake (1), having seen nothing of B that follows it. Pushing before the dependency wait breaks
(3); leaving a restore undrained breaks (1).

**Why an address may not depend on the call's shape.** The chain holds per row and phase. A peer
one call ahead pushes while this rank still holds unread words of the call before; if the strides
followed the number of tokens or the hidden size, one row's words would land on another's. With
fixed strides calls of any shape, and of both strategies, may follow each other.

**Why it ends.** Every worker pushes all its rows before it polls any, so nothing a peer waits for
stands behind a wait. A peer that died is found by the bound on polling: the waiting rank reports
(rank, row, phase, source), stops, and pushes nothing more, so every other rank ends likewise.
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
    "last_word_only",  # a vector counts as arrived when its last word has
    "late_restore",  # restores may land after the next kernel's pushes
    "lost_restore",  # the last word of a vector is not restored
    "raw_sentinel",  # data equal to the sentinel are sent as they are
    "push_before_wait",  # pushes precede the dependency wait
    "poll_before_push",  # a worker polls its rows before it pushes them
    "torn_partial",  # the partial sum and its epoch travel as two words
]
MUTATIONS: tuple[Mutation, ...] = get_args(Mutation)

SENTINEL = 0
SUBSTITUTE = 1  # what `encode` sends for data equal to the sentinel
VECTOR_WORDS = 2  # the kernels' vectors have four words; two are enough to arrive in halves
VALUE_BITS = 20  # stores are packed as address, old and new value; the machine unpacks them

STORE, RESTORE, POLL, LOAD, MATCH, START, END = range(7)
_DATA, _REDUCED, _PARTIAL = range(3)


@dataclass(frozen=True)
class Call:
    """One collective call: ``words`` 32-bit words per row.

    A multiple of ``VECTOR_WORDS``, and for two-shot of ``VECTOR_WORDS · world_size``.
    """

    strategy: Strategy
    num_tokens: int
    words: int


class Step(NamedTuple):
    """One instruction.

    ``STORE`` and ``RESTORE`` put the packed store ``value`` in flight; ``POLL`` waits until the
    word at ``address`` differs from the sentinel and must then find ``value``; ``LOAD`` must find
    it at once; ``MATCH`` waits for it; ``START`` waits until ``value`` workers of the rank have
    passed ``END`` and the rank's restores have landed.
    """

    kind: int
    address: int
    value: int


@dataclass(frozen=True)
class Layout:
    """Word addresses of N buffers of one size, rank after rank."""

    world_size: int
    rows: int
    slot_words: int

    @property
    def region_words(self) -> int:
        """Words of the slots of one stage (pushed, reduced)."""
        return 2 * self.rows * self.world_size * self.slot_words

    @property
    def rank_words(self) -> int:
        """Words of one rank's buffer: pushed slots, reduced slots, {epoch, partial} pairs."""
        return 2 * self.region_words + 4 * self.rows * self.world_size

    def slot(self, stage: int, rank: int, phase: int, row: int, source: int) -> int:
        """Address of the first word of a slot in the buffer of ``rank``."""
        base = rank * self.rank_words + stage * self.region_words
        return base + self.offset(stage, phase, row, source)

    def offset(self, stage: int, phase: int, row: int, source: int) -> int:
        """Words from the start of the stage's region to a slot."""
        index = (phase * self.rows + row) * self.world_size + source
        return index * (2 if stage == _PARTIAL else self.slot_words)

    def owner(self, address: int) -> tuple[int, int, int]:
        """(row, phase, source) of a word."""
        stage, inner = divmod(address % self.rank_words, self.region_words)
        index = inner // (2 if stage == _PARTIAL else self.slot_words)
        index, source = divmod(index, self.world_size)
        phase, row = divmod(index, self.rows)
        return row, phase, source


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
    layout = Layout(world_size, max(c.num_tokens for c in calls), max(c.words for c in calls))
    steps: list[list[Step]] = [[] for _ in range(world_size * workers)]
    epochs: Counter[int] = Counter()
    last_two_shot: dict[tuple[int, int], int] = {}  # (row, phase) -> number of the call
    for number, call in enumerate(calls):
        epochs.update(range(call.num_tokens))
        writer = _Writer(layout, number, call, dict(epochs), dict(last_two_shot), mutation)
        for rank in range(world_size):
            for worker in range(workers):
                # Which worker gets a row differs from rank to rank and from call to call.
                rows = range((worker - number * rank) % workers, call.num_tokens, workers)
                written = writer.kernel(rank, rows, arrivals=number * workers)
                steps[rank * workers + worker] += written
        if call.strategy == "two_shot":
            last_two_shot |= {(r, writer.phase(r)): number for r in range(call.num_tokens)}
    return Programme(layout, workers, tuple(map(tuple, steps)), mutation != "late_restore")


@dataclass(frozen=True)
class _Writer:
    """Writes the steps of one call."""

    layout: Layout
    number: int
    call: Call
    epochs: dict[int, int]
    last_two_shot: dict[tuple[int, int], int]
    mutation: Mutation | None

    def kernel(self, rank: int, rows: Sequence[int], arrivals: int) -> list[Step]:
        """One worker's kernel: wait for the one before, sweep its rows, arrive."""
        start, end = Step(START, 0, arrivals), Step(END, 0, 0)
        first, *sweeps = self.sweeps(rank, rows)
        if self.mutation == "push_before_wait":
            return [*first, start, *(s for sweep in sweeps for s in sweep), end]
        if self.mutation == "poll_before_push":
            return [start, *(s for sweep in sweeps for s in sweep), *first, end]
        return [start, *first, *(s for sweep in sweeps for s in sweep), end]

    def sweeps(self, rank: int, rows: Sequence[int]) -> list[list[Step]]:
        """Push everything; then poll. Two-shot: then push what was reduced; then poll that."""
        peers = [p for p in range(self.layout.world_size) if p != rank]
        if self.call.strategy == "one_shot":
            whole = range(self.call.words)
            return [
                [s for row in rows for p in peers for s in self.push(_DATA, rank, p, row, whole)],
                [s for row in rows for p in peers for s in self.take(_DATA, rank, p, row, whole)],
            ]
        shards = [self.shard(owner) for owner in range(self.layout.world_size)]
        own = shards[rank]
        scatter: list[Step] = []
        reduce: list[Step] = []
        gather: list[Step] = []
        for row in rows:
            for peer in peers:
                scatter += self.push(_DATA, rank, peer, row, shards[peer])
                reduce += self.take(_DATA, rank, peer, row, own)
                gather += self.take(_REDUCED, rank, peer, row, shards[peer])
                gather += self.take_partial(rank, peer, row)
            for peer in peers:
                reduce += self.push(_REDUCED, rank, peer, row, own)
                reduce += self.push_partial(rank, peer, row)
        return [scatter, reduce, gather]

    def push(
        self, stage: int, source: int, target: int, row: int, columns: range
    ) -> Iterable[Step]:
        """``source`` stores its words into its slot at ``target``."""
        at = self.address(stage, target, row, source) - columns[0]
        for column in columns:
            word = self.word(stage, source, row, column)
            yield self.store(STORE, at + column, SENTINEL, encode(word, self.mutation))

    def take(self, stage: int, rank: int, source: int, row: int, columns: range) -> Iterable[Step]:
        """``rank`` polls the slot of ``source`` in its own buffer, vector by vector."""
        at = self.address(stage, rank, row, source) - columns[0]
        for first in columns[::VECTOR_WORDS]:
            vector = [(at + c, encode(self.word(stage, source, row, c)))
                      for c in range(first, first + VECTOR_WORDS)]  # fmt: skip
            polled = vector[-1:] if self.mutation == "last_word_only" else vector
            yield from (Step(POLL, *word) for word in polled)
            yield from (Step(LOAD, *word) for word in vector if word not in polled)
            restored = vector[:-1] if self.mutation == "lost_restore" else vector
            yield from (self.store(RESTORE, a, word, SENTINEL) for a, word in restored)

    def push_partial(self, source: int, target: int, row: int) -> Iterable[Step]:
        """One 8-byte store: the partial sum and the epoch cannot be seen apart."""
        at = self.address(_PARTIAL, target, row, source)
        before = self.last_two_shot.get((row, self.phase(row)))
        for half in range(2 if self.mutation == "torn_partial" else 1):
            old = 0 if before is None else self.tag(_PARTIAL, source, row, half, before)
            yield self.store(STORE, at + half, old, self.tag(_PARTIAL, source, row, half))

    def take_partial(self, rank: int, source: int, row: int) -> Iterable[Step]:
        """Waits for this epoch's word; nothing to restore."""
        at = self.address(_PARTIAL, rank, row, source)
        yield Step(MATCH, at, self.tag(_PARTIAL, source, row, 0))
        if self.mutation == "torn_partial":
            yield Step(LOAD, at + 1, self.tag(_PARTIAL, source, row, 1))

    def address(self, stage: int, rank: int, row: int, source: int) -> int:
        strides = self.layout
        if self.mutation == "shape_dependent_slots":
            strides = replace(strides, rows=self.call.num_tokens, slot_words=self.call.words)
        region = self.layout.slot(stage, rank, 0, 0, 0)
        return region + strides.offset(stage, self.phase(row), row, source)

    def phase(self, row: int) -> int:
        return 0 if self.mutation == "one_phase" else self.epochs[row] % 2

    def shard(self, owner: int) -> range:
        width = self.call.words // self.layout.world_size
        return range(owner * width, (owner + 1) * width)

    def word(self, stage: int, source: int, row: int, column: int) -> int:
        """The data: every word of a run is different, but each fifth equals the sentinel."""
        tag = self.tag(stage, source, row, column)
        return SENTINEL if tag % 5 == 0 else tag

    def tag(self, stage: int, source: int, row: int, column: int, number: int | None = None) -> int:
        """A number that no other word of the run has; above the substitute."""
        index = (self.number if number is None else number) * 3 + stage
        for digit, base in (
            (source, self.layout.world_size),
            (row, self.layout.rows),
            (column, self.layout.slot_words),
        ):
            index = index * base + digit
        return index + SUBSTITUTE + 1

    @staticmethod
    def store(kind: int, address: int, old: int, new: int) -> Step:
        """A store that must find ``old``: whatever else lies there was not to be overwritten."""
        return Step(kind, address, ((address << VALUE_BITS) + old << VALUE_BITS) + new)
