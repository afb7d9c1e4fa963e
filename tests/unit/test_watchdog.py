"""The watchdog: what it says of a dead backend, whom it tells, and when its thread is there."""

from __future__ import annotations

import gc
import logging
import os
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

from fusewise.backends.native import watchdog
from fusewise.backends.native.watchdog import REPLAY_TIMEOUT, Pulse, replay_timeout_s
from fusewise.errors import InputError, RankTimeoutError
from tests.groups import BOUND_S, MirrorGroup

DEAD = [1, 0, 17, 2, 1]  # state, rank, row, phase, peer


@pytest.fixture(autouse=True)
def own_watchdog(monkeypatch: pytest.MonkeyPatch) -> Iterator[watchdog.Watchdog]:
    """A watchdog without the pulses that other tests left; it looks often."""
    mine = watchdog.Watchdog()
    monkeypatch.setattr(watchdog, "_watchdog", mine)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.005)
    yield mine
    for pulse in list(mine._pulses):
        pulse.close()


def page() -> torch.Tensor:
    return torch.zeros(8, dtype=torch.int32)


def pulse_on(words: torch.Tensor, label: str = "native.one_shot") -> Pulse:
    return Pulse(label, MirrorGroup(2), words)  # type: ignore[arg-type]


def die(words: torch.Tensor) -> None:
    """What the kernel does: the state last."""
    words[1:5] = torch.tensor(DEAD[1:], dtype=torch.int32)
    words[0] = DEAD[0]


def ended(thread: threading.Thread | None) -> bool:
    assert thread is not None
    thread.join(timeout=BOUND_S)
    return not thread.is_alive()


def test_a_time_out_is_seen_without_any_call_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words, heard, told = page(), threading.Event(), []
    pulse = pulse_on(words)

    def tell(error: RankTimeoutError) -> None:
        told.append(str(error))
        heard.set()

    pulse.on_death(tell)
    pulse.check()
    with caplog.at_level(logging.ERROR, "fusewise"):
        die(words)
        assert heard.wait(BOUND_S)
        pulse.look()
        pulse.look()
    (line,) = [record.getMessage() for record in caplog.records]
    assert told == [line]
    assert "rank 0 waited at row 17 for rank 1 (phase 2)" in line
    assert "the reduced columns within 5 s, in a graph 5 s" in line
    with pytest.raises(RankTimeoutError, match="rank 0 waited at row 17 for rank 1"):
        pulse.check()


def test_what_is_alive_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    pulse = pulse_on(page())
    pulse.on_death(lambda error: pytest.fail("told"))
    pulse.look()
    pulse.check()
    assert not caplog.records


def test_one_thread_for_all_and_none_after_the_last(own_watchdog: watchdog.Watchdog) -> None:
    assert own_watchdog.thread is None
    first, second = pulse_on(page()), pulse_on(page())
    thread = own_watchdog.thread
    first.close()
    first.close()
    assert own_watchdog.thread is thread and thread is not None and thread.is_alive()
    assert thread.daemon
    second.close()
    assert ended(thread)
    third = pulse_on(page())
    assert own_watchdog.thread is not thread
    third.close()
    assert ended(thread)


def test_a_pulse_dropped_unclosed_is_forgotten(own_watchdog: watchdog.Watchdog) -> None:
    pulse = pulse_on(page())
    thread = own_watchdog.thread
    del pulse
    gc.collect()
    assert ended(thread)


def test_closed_ones_are_not_looked_at_and_the_others_still_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words, others, heard = page(), page(), threading.Event()
    closed, open_one = pulse_on(words, "native.one_shot"), pulse_on(others, "native.two_shot")
    closed.close()
    open_one.on_death(lambda error: heard.set())
    die(words)
    die(others)
    assert heard.wait(BOUND_S)
    assert [r.getMessage().split(" of ")[0] for r in caplog.records] == ["native.two_shot"]


def test_a_listener_that_fails_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    first, second = page(), page()
    called, heard = threading.Event(), threading.Event()
    failing, other = pulse_on(first), pulse_on(second)

    def fail(error: RankTimeoutError) -> None:
        called.set()
        raise ZeroDivisionError

    failing.on_death(fail)
    other.on_death(lambda error: heard.set())
    die(first)
    assert called.wait(BOUND_S)
    die(second)  # only now: a look that had passed the first would tell of the second before it
    assert heard.wait(BOUND_S)
    assert "ZeroDivisionError" in caplog.text


def test_a_listening_object_is_not_kept_alive() -> None:
    heard: list[RankTimeoutError] = []

    class Ear:
        def tell(self, error: RankTimeoutError) -> None:
            heard.append(error)

    words, kept, dropped = page(), Ear(), Ear()
    pulse = pulse_on(words)
    pulse.on_death(kept.tell)
    pulse.on_death(dropped.tell)
    del dropped
    pulse.close()
    die(words)
    pulse.look()
    assert len(heard) == 1


def test_a_forked_child_watches_its_own_and_not_its_parents(
    own_watchdog: watchdog.Watchdog,
) -> None:
    os.register_at_fork(after_in_child=own_watchdog.__init__)  # type: ignore[misc]
    parents, words = page(), page()
    pulse_of_parent = pulse_on(parents)
    pulse_of_parent.on_death(lambda error: os._exit(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a process with threads forks is the point here
        child = os.fork()
    if child == 0:
        heard = threading.Event()
        mine = pulse_on(words)
        mine.on_death(lambda error: heard.set())
        die(parents)
        die(words)
        os._exit(0 if heard.wait(BOUND_S) else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert own_watchdog.thread is not None and own_watchdog.thread.is_alive()


@pytest.mark.parametrize(
    ("text", "group_s", "bound_s"),
    [("", 120.0, 20.0), ("0.5", 120.0, 0.5), ("300", 120.0, 120.0), ("300", 600.0, 300.0),
     ("", 2.0, 2.0)],
)  # fmt: skip
def test_the_bound_of_replays(text: str, group_s: float, bound_s: float) -> None:
    assert replay_timeout_s(group_s, {REPLAY_TIMEOUT: text}) == bound_s


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_bound_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"{REPLAY_TIMEOUT}: expected seconds"):
        replay_timeout_s(120.0, {REPLAY_TIMEOUT: text})
