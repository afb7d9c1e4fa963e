"""The push protocol under a hundred thousand random schedules, and mutants that must be caught."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.emulator.protocol import MUTATIONS, UNIT_WORDS, Call, Layout, Programme, build, encode
from tests.emulator.protocol_machine import run


def one_shot(num_tokens: int, words: int) -> Call:
    return Call("one_shot", num_tokens, words)


def two_shot(num_tokens: int, words: int) -> Call:
    return Call("two_shot", num_tokens, words)


# (world size, workers per rank, calls, schedules). Small runs find faults as well as large ones
# and many more of them fit into a second; the large ones show that size changes nothing.
SCHEDULES = [
    (2, 1, (one_shot(1, 2),) * 3, 30_000),
    (2, 1, (one_shot(2, 2), one_shot(1, 4), one_shot(2, 2)), 20_000),
    (2, 2, (one_shot(1, 2), one_shot(2, 2), one_shot(1, 4)), 20_000),
    (2, 1, (one_shot(1, 2), two_shot(1, 4), one_shot(1, 2)), 15_000),
    (2, 1, (two_shot(1, 4),) * 3, 8_000),
    (2, 2, (two_shot(2, 4), one_shot(3, 2), two_shot(1, 4), one_shot(2, 4)), 2_000),
    (3, 1, (one_shot(1, 2),) * 3, 4_000),
    (4, 2, (one_shot(1, 2), two_shot(1, 8), one_shot(2, 2)), 800),
    (5, 2, (one_shot(2, 2), one_shot(1, 2), one_shot(2, 2)), 150),
    (8, 1, (one_shot(1, 2),) * 3, 200),
    (8, 2, (two_shot(1, 16), one_shot(1, 2), two_shot(1, 16)), 50),
]


def test_enough_schedules_are_tried() -> None:
    assert sum(count for *_, count in SCHEDULES) >= 100_000


@pytest.mark.parametrize(("world_size", "workers", "calls", "count"), SCHEDULES)
def test_no_schedule_breaks_the_protocol(
    world_size: int, workers: int, calls: tuple[Call, ...], count: int
) -> None:
    programme = build(world_size, calls, workers)
    rng = random.Random()
    for seed in range(count):
        rng.seed(seed)
        outcome = run(programme, rng)
        assert outcome.fault is None, f"{outcome.fault}; seed {seed}"
        assert len(outcome.finished) == world_size


@st.composite
def programmes(draw: st.DrawFn) -> Programme:
    world_size = draw(st.integers(2, 8))
    shapes = st.builds(
        lambda strategy, num_tokens, vectors: Call(
            strategy, num_tokens, 2 * vectors * (world_size if strategy == "two_shot" else 1)
        ),
        st.sampled_from(["one_shot", "two_shot"]),
        st.integers(1, 3),
        st.integers(1, 2),
    )
    calls = draw(st.lists(shapes, min_size=1, max_size=5 if world_size < 4 else 3))
    return build(world_size, calls, draw(st.integers(1, 3)))


relaxed = settings(
    max_examples=100, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@relaxed
@given(programmes(), st.integers(0, 2**32))
def test_any_series_of_calls_ends_with_the_right_words(programme: Programme, seed: int) -> None:
    outcome = run(programme, random.Random(seed))
    assert outcome.fault is None
    assert len(outcome.finished) == programme.layout.world_size


@relaxed
@given(programmes(), st.integers(0, 2**32), st.data())
def test_a_dead_rank_is_reported_and_nobody_waits_for_ever(
    programme: Programme, seed: int, data: st.DataObject
) -> None:
    world_size = programme.layout.world_size
    dead = data.draw(st.integers(0, world_size - 1))
    first = dead * programme.workers
    lengths = [len(steps) for steps in programme.steps[first : first + programme.workers]]
    cuts = [data.draw(st.integers(0, length)) for length in lengths]
    outcome = run(programme.killed(dead, cuts), random.Random(seed), poll_bound=30)
    assert outcome.fault is None  # also then no wrong word is ever taken for a right one
    reporting = {missing.rank for missing in outcome.missing}
    assert reporting | outcome.finished == set(range(world_size)) - {dead}
    assert not reporting & outcome.finished
    assert all(missing.source != missing.rank for missing in outcome.missing)


def test_a_report_names_rank_unit_phase_and_source() -> None:
    programme = build(2, [one_shot(1, 2), one_shot(2, 2)], workers=1)
    start_push_take_end = len(programme.steps[1]) // 3
    killed = programme.killed(1, [start_push_take_end])  # after its first call
    (missing,) = run(killed, random.Random(0), poll_bound=30).missing
    assert (missing.rank, missing.unit, missing.phase, missing.source) == (0, 0, 0, 1)


MIXES = [
    (one_shot(2, 4), one_shot(1, 2), one_shot(2, 4), one_shot(2, 2)),
    (two_shot(2, 4), one_shot(1, 2), two_shot(1, 4), two_shot(2, 4)),
    (one_shot(1, 4), one_shot(2, 4), one_shot(1, 8), one_shot(2, 2)),
]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mutant_is_caught(mutation: str) -> None:
    rng = random.Random(1)
    mutants = [build(2, mix, 2, mutation) for mix in MIXES]  # type: ignore[arg-type]
    faults = [run(m, rng).fault for m in mutants for _ in range(400)]
    assert any(faults), f"{mutation} was not noticed"


def test_the_same_runs_are_clean_without_a_mutation() -> None:
    rng = random.Random(1)
    sound = [build(2, mix, 2) for mix in MIXES]
    assert not any(run(p, rng).fault for p in sound for _ in range(400))


def test_what_is_sent_is_never_the_sentinel() -> None:
    assert encode(0) != 0
    assert encode(7) == 7


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.data())
def test_slots_are_disjoint_and_know_their_owner(
    world_size: int, units: int, data: st.DataObject
) -> None:
    layout = Layout(world_size, units)
    taken: set[int] = set()
    for phase, width in ((0, UNIT_WORDS), (1, UNIT_WORDS), (2, UNIT_WORDS), (3, 1)):
        for unit, source in [(u, s) for u in range(units) for s in range(world_size)]:
            first = layout.slot(1, phase, unit, source)
            span = set(range(first, first + width))
            assert not span & taken
            taken |= span
            assert layout.owner(data.draw(st.sampled_from(sorted(span)))) == (unit, phase, source)
    assert (min(taken), max(taken)) == (layout.rank_words, 2 * layout.rank_words - 1)
