"""What a supervisor makes of ranks that die, stall, raise or finish."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fusewise.errors import InputError, RankError
from fusewise.ranks.nursery import Nursery
from fusewise.ranks.place import PLACES
from fusewise.ranks.supervisor import Failure, run_attempt
from fusewise.ranks.teams import Team, local_team
from fusewise.tune import supervise
from fusewise.tune.settings import Settings
from fusewise.tune.stack_grid import StackGrid
from tests.faults.jobs import FAKES
from tests.ranks import run_ranks

TWO = Team(2, (0, 1), (0, 1), PLACES["cpu"])


def attempt(how: str, nursery: Nursery) -> tuple[Any, list[tuple[int, dict[str, Any]]]]:
    events: list[tuple[int, dict[str, Any]]] = []
    outcome = run_attempt(
        TWO,
        "tests.faults.jobs:misbehave",
        {"how": how},
        lambda r, e: events.append((r, e)),
        nursery,
    )
    return outcome, events


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """One for all attempts here whose output is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEWISE_TEST_RUN", f"shared-{os.getpid()}")
        made = Nursery()
    with made:
        yield made


def only_it_is_alive(nursery: Nursery) -> bool:
    return workers_alive(f"shared-{os.getpid()}") == [str(nursery._process.pid)]


def workers_alive(run: str = str(os.getpid())) -> list[str]:
    """Processes that a test run's supervisors started: they carry its mark in their environment.

    A rank has the command line and the environment of what it was forked from.
    """
    mark, found = f"\0FUSEWISE_TEST_RUN={run}\0".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"fusewise.ranks.nursery" in (folder / "cmdline").read_bytes():
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if mark in b"\0" + (folder / "environ").read_bytes() and state != "Z":
                    found.append(folder.name)
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWISE_TEST_RUN", str(os.getpid()))


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("crash", "died", "was killed by SIGSEGV"),
        ("late", "died", "was killed by SIGSEGV"),  # its peer's error is heard first
        ("raise", "error", "failed with UnavailableError: no such thing. Do this."),
        ("spin", "stalled", "made no progress in time"),
    ],
)
def test_a_bad_rank_ends_the_attempt_with_its_name_phase_and_backend(
    how: str, kind: str, reason: str, nursery: Nursery
) -> None:
    outcome, _ = attempt(how, nursery)
    failure = outcome.failure
    assert failure is not None
    assert (failure.rank, failure.kind, failure.phase) == (1, kind, "misbehave")
    assert (failure.backend, failure.reason) == ("backend.x", reason)
    assert only_it_is_alive(nursery)


def _without_a_nursery(rank: int) -> str:
    """What one of two supervisors under torchrun learns when rank 1's cannot start its rank."""
    from fusewise.ranks.group import Group

    team = Team(2, (rank,), (rank,), PLACES["cpu"], Group(device="cpu", timeout_s=50.0))
    with Nursery() as nursery:
        if rank == 1:
            nursery._process.kill()
        try:
            outcome = run_attempt(
                team, "tests.faults.jobs:misbehave", {"how": "return"}, lambda r, e: None, nursery
            )
        except RankError as error:
            return f"raised: {error}"
        return str(outcome.failure)


def test_peers_hear_at_once_of_a_supervisor_that_cannot_start_its_rank() -> None:
    learned = run_ranks(_without_a_nursery, 2, timeout_s=40.0)  # less than a wait between ranks
    assert learned[0] == "rank 1 could not start at 'start'"
    assert learned[1].startswith("raised: the process that starts ranks")


def test_good_ranks_return_their_results_and_keep_stdout_clean(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Nursery() as nursery:  # here, so that what is captured is what it writes to
        outcome, events = attempt("return", nursery)
    assert outcome.failure is None
    assert outcome.results == {0: "done as local rank 0", 1: "done as local rank 1"}
    assert {rank for rank, _ in events} == {0, 1}
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "chatter on stdout" in printed.err
    assert workers_alive() == []


def failure(**changes: Any) -> Failure:
    facts: dict[str, Any] = {
        "rank": 1, "kind": "died", "phase": "p", "backend": "custom", "reason": "exited with 7",
    }  # fmt: skip
    return Failure(**(facts | changes))


def test_a_backend_is_left_out_but_outside_kills_and_the_baseline_stop_the_tune() -> None:
    assert supervise._culprit(failure()) == "custom"
    assert supervise._culprit(failure(reason="was killed by SIGSEGV")) == "custom"
    for other in (
        {"reason": "was killed by SIGKILL"},
        {"reason": "was killed by SIGTERM"},
        {"backend": None},
        {"backend": "nccl"},
        {"backend": "gloo"},
    ):
        with pytest.raises(RankError, match=r"rank 1 .* at 'p'\. Nothing was written"):
            supervise._culprit(failure(**other))


def test_world_sizes_out_of_range_are_refused() -> None:
    most = max(8, os.cpu_count() or 1)
    for size, text in ((1, "at least 2, got 1"), (most + 1, f"1 to {most} CPU ranks")):
        with pytest.raises(InputError, match=text):
            local_team(size)
    assert local_team(None).world_size == 2
    assert local_team(3).ranks == (0, 1, 2)
    assert local_team(most).world_size == most


SETTINGS = Settings("bfloat16", (64,), 1024, 4096, 10.0, rounds=5, timeout_s=20.0)


def test_bad_backends_are_excluded_with_their_reasons_and_the_tune_goes_on() -> None:
    events: list[dict[str, Any]] = []
    request = {"settings": asdict(SETTINGS), "known": None}
    document = supervise.until_done(
        TWO, "tests.faults.jobs:tune_with_fakes", request, SETTINGS.timeout_s, events.append
    )
    profile = supervise.parse_profile(document, "the profile")
    good = {"gloo + rms_norm", "shm.one_shot"}
    assert {path.name for path in profile.paths} == good
    assert {s.path for s in profile.samples if s.op == "all_reduce_rms_norm"} == good
    reasons = {item.backend: item.reason for item in profile.excluded}
    assert reasons.keys() == FAKES.keys()
    assert reasons["fake.crashes"] == "rank 1 was killed by SIGSEGV at 'build fake.crashes'"
    # Rank 0 is as silent while it waits for the rank that spins; whichever is seen first is named.
    assert "made no progress in time at 'verify fake.spins'" in reasons["fake.spins"]
    assert "rank 1: RuntimeError: out of handles" in reasons["fake.fails"]
    assert "differs between ranks" in reasons["fake.differs"]
    assert "elements by rank {0: 1, 1: 1}" in reasons["fake.lies"]
    assert {e["backend"] for e in events if e["kind"] == "excluded"} == FAKES.keys()
    assert workers_alive() == []


def test_a_verification_names_every_bad_backend_and_its_first_failing_case() -> None:
    grid = StackGrid(("bfloat16",), (64,), (1, 17, 18), timeout_s=20.0)
    rows = supervise.until_done(
        TWO, "tests.faults.jobs:verify_with_fakes", {"settings": asdict(grid)}, 20.0, lambda e: None
    )
    found = {row["backend"]: row for row in rows}
    assert [name for name, row in found.items() if row["verdict"] == "pass"] == [
        "gloo", "shm.one_shot",
    ]  # fmt: skip
    assert {found[name]["verdict"] for name in FAKES} == {"fail"}
    assert "killed by SIGSEGV" in found["fake.crashes"]["reason"]
    assert "no progress in time" in found["fake.spins"]["reason"]
    assert found["fake.lies"]["first_failure"] == "eager: all_reduce_rms_norm 18x64 bfloat16"
    assert "elements by rank {0: 1, 1: 1}" in found["fake.lies"]["reason"]
    assert "differs between ranks" in found["fake.differs"]["reason"]
    assert found["fake.fails"]["first_failure"] == "building it"
    assert workers_alive() == []
