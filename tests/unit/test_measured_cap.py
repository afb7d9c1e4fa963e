"""The cap that measured columns give: per hidden size, and for a node that has several."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusewise.engines.audit import audit
from fusewise.engines.cap import decide_cap
from fusewise.profiles import store
from tests.engine_profiles import COLUMN, MIB, TP2, Times, measured


def test_a_measured_tie_does_not_lose_and_a_clear_loss_does() -> None:
    tie = {**COLUMN, 8 * MIB: (41.5, None, 41.0)}
    loss = {**COLUMN, 8 * MIB: (42.5, None, 41.0)}
    assert decide_cap(measured({2048: tie}), TP2).cap_bytes == 8 * MIB
    assert decide_cap(measured({2048: loss}), TP2).cap_bytes == 4 * MIB


def test_hidden_sizes_have_caps_of_their_own_and_the_node_the_smallest() -> None:
    wide = {**COLUMN, 8 * MIB: (40.0, None, 41.0)}
    profile = measured({2048: COLUMN, 4096: wide})
    assert decide_cap(profile, TP2).cap_bytes == 4 * MIB
    assert decide_cap(profile, TP2, hidden_size=4096).cap_bytes == 8 * MIB
    assert decide_cap(profile, TP2, hidden_size=8192).cap_bytes == 8 * MIB
    assert decide_cap(profile, TP2, hidden_size=1024).cap_bytes == 4 * MIB


def test_samples_that_stop_below_the_engines_cap_leave_it_to_the_rule() -> None:
    short: dict[int, Times] = {1 * MIB: (7.3, 12.0, 10.3)}
    decision = decide_cap(measured({2048: short}), TP2)
    assert (decision.cap_bytes, decision.level) == (64 * MIB, "engine default")
    reaching = {**short, 64 * MIB: (200.0, None, 282.0)}
    decision = decide_cap(measured({2048: reaching}), TP2)
    assert (decision.cap_bytes, decision.origin) == (64 * MIB, "measured")


def test_an_unanswered_hidden_size_leaves_its_own_cap_to_the_rule() -> None:
    short: dict[int, Times] = {1 * MIB: (7.3, 12.0, 10.3)}
    profile = measured({2048: COLUMN, 4096: short})
    assert decide_cap(profile, TP2).cap_bytes == 4 * MIB
    assert decide_cap(profile, TP2).origin == "measured"
    assert decide_cap(profile, TP2, hidden_size=4096).level == "engine default"
    wins = measured({2048: {64 * MIB: (200.0, None, 282.0)}, 4096: short})
    assert decide_cap(wins, TP2).level == "engine default"
    assert decide_cap(wins, TP2, hidden_size=2048).origin == "measured"


def test_a_loss_with_nothing_smaller_does_not_speak_for_other_hidden_sizes() -> None:
    large: dict[int, Times] = {64 * MIB: (387.0, None, 282.0)}
    profile = measured({2048: large, 4096: {1 * MIB: (7.3, 12.0, 10.3)}})
    assert decide_cap(profile, TP2).level == "engine default"
    assert decide_cap(profile, TP2, hidden_size=2048).cap_bytes == 0


@pytest.mark.parametrize(("rounds", "cap"), [(1, 4 * MIB), (9, 8 * MIB)])
def test_a_number_without_its_spread_loses_by_its_sign(rounds: int, cap: int) -> None:
    profile = measured({2048: {**COLUMN, 8 * MIB: (41.4, None, 41.0)}})
    samples = tuple(
        sample.model_copy(update={"times_us": sample.times_us[:rounds]})
        for sample in profile.samples
    )
    decided = decide_cap(profile.model_copy(update={"samples": samples}), TP2)
    assert (decided.cap_bytes, decided.origin) == (cap, "measured")


def test_what_a_cap_gives_up_is_said() -> None:
    again = {**COLUMN, 64 * MIB: (200.0, 300.0, 282.0)}
    why = decide_cap(measured({2048: again}), TP2).why
    assert why.endswith(
        "gives up to 82.33 µs away where fusing wins above it (at 64M, hidden 2048)"
    )
    assert "gives" not in decide_cap(measured({2048: COLUMN}), TP2).why


def test_an_audit_of_some_hidden_sizes_answers_for_those() -> None:
    wide = {**COLUMN, 8 * MIB: (40.0, None, 41.0)}
    profile = measured({2048: COLUMN, 4096: wide})
    for hidden_sizes, cap in (((), 4), ((4096,), 8), ((4096, 2048), 4)):
        assert audit(profile, TP2, hidden_sizes=hidden_sizes).cap.cap_bytes == cap * MIB


@pytest.mark.parametrize(
    ("num_tokens", "origin"), [(4681, "measured"), (4680, "engine default"), (4682, "measured")]
)
def test_the_last_whole_token_reaches_the_engines_cap(num_tokens: int, origin: str) -> None:
    """64 MiB is 4681.14 tokens of 7168."""
    size = num_tokens * 2 * 7168
    decision = decide_cap(measured({7168: {size: (200.0, None, 282.0)}}), TP2)
    assert decision.origin == origin
    assert decision.cap_bytes == max(size, 64 * MIB)


def test_two_h200s_as_they_were_tuned() -> None:
    """A loss at one hidden size is the node's cap, whatever the others were measured to."""
    file = Path(__file__).resolve().parents[2] / "benchmarks/results/two_gpus/profile_tp2.json"
    profile = store.load(file)
    decision = decide_cap(profile, TP2)
    assert (decision.cap_bytes, decision.origin) == (1117 * 4096, "measured")
    for hidden_size in (4096, 7168):
        decision = decide_cap(profile, TP2, hidden_size=hidden_size)
        assert (decision.cap_bytes, decision.origin) == (64 * MIB, "measured")
