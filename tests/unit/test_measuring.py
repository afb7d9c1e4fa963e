"""One measurement at a time on a machine, and a word if others use it."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from fusewise.commands import measuring
from fusewise.commands.after_tune import unreached, what_now
from fusewise.commands.app import app
from fusewise.commands.progress import progress
from fusewise.errors import UnavailableError
from fusewise.profiles import store
from fusewise.tune.settings import Settings
from tests.samples import FUSED, NODE, UNFUSED, profile_of


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "measuring.lock"
    monkeypatch.setenv("FUSEWISE_MEASURING_LOCK", str(file))
    monkeypatch.setattr(measuring, "busy", list)
    return file


def test_a_second_measurement_waits_names_the_first_and_then_gives_up(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "_WAIT_S", 0.1)
    with (
        FileLock(lock),
        pytest.raises(UnavailableError, match=f"process {os.getpid()}"),
        measuring.alone(),
    ):
        raise AssertionError("the lock is held")
    assert "another fusewise" in capsys.readouterr().err
    with measuring.alone():
        pass
    assert capsys.readouterr().err == ""


def test_other_users_may_take_the_same_lock(lock: Path) -> None:
    with measuring.alone():
        assert lock.stat().st_mode & 0o777 == 0o666


def test_a_lock_that_cannot_be_made_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSEWISE_MEASURING_LOCK", "/proc/none/lock")
    with pytest.raises(UnavailableError, match="FUSEWISE_MEASURING_LOCK"), measuring.alone():
        pass


@pytest.mark.parametrize(("busy", "said"), [(19, 0), (21, 1)])
def test_a_busy_machine_is_said(busy: int, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([[0] * 8, [busy, 0, 0, 100 - busy, 0, 0, 0, 0]])
    monkeypatch.setattr(measuring, "_cpu_ticks", lambda: next(ticks))
    monkeypatch.setattr(measuring, "_busy_gpus", list)
    assert len(measuring.busy()) == said


def test_what_was_not_reached_is_said_by_size() -> None:
    settings = Settings("bfloat16", (64,), 128, 2**20, 2.0)
    points = [["all_reduce", 2**i, 64] for i in range(10)]
    lines = unreached({"points": points, "planned": 12}, settings)
    assert "2 of 12 points" in lines[0]
    assert lines[1].strip().startswith("all_reduce at hidden 64: 128B, 256B, 512B, 1K")
    assert lines[1].endswith("and 2 more")
    assert unreached({"points": [], "planned": 12}, settings) == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_to_do_now_is_three_lines_and_its_commands_run_as_printed(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It named `show --profile`, which there was not."""
    monkeypatch.setenv("FUSEWISE_PROFILE", "nvidia-h200-tp8")
    monkeypatch.chdir(tmp_path)  # `report` writes its page here
    profile = store.load("nvidia-h200-tp8")
    (tmp_path / profile.file_name).write_text(profile.to_json())
    lines = what_now(profile, tmp_path if elsewhere else None)
    assert len(lines) == 3
    assert [str(tmp_path) in line for line in lines] == [elsewhere, elsewhere, False]
    for command in re.findall(r"`fusewise (.*?)`", " ".join(lines)):
        name, *options = shlex.split(command)
        result = CliRunner().invoke(app, [name, *options])
        assert result.exit_code == 0, (command, result.output)


def test_cpu_ranks_are_told_that_engines_are_about_gpus() -> None:
    mark = NODE.model_copy(update={"device_type": "cpu", "sm": None})
    lines = what_now(profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}}, node=mark), None)
    assert "CPU ranks" in lines[1]


def test_progress_counts_and_says_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((10.0, 10.0, 20.0, 20.0, 30.0, 30.0))
    monkeypatch.setattr("fusewise.commands.progress.time.monotonic", lambda: next(clock))
    event = {"kind": "progress", "op": "all_reduce", "shape": "1x64 bfloat16", "planned": 8}
    with progress("tune") as listen:
        listen(event | {"done": 0, "left_s": None})
        listen(event | {"done": 2, "left_s": None})  # 5 s each, 6 to go
        listen(event | {"done": 4, "left_s": 7.0})  # the budget ends before
    assert [line.partition("bfloat16")[2] for line in capsys.readouterr().err.splitlines()] == [
        "", ", about 30 s left", ", about 7 s left",
    ]  # fmt: skip


def test_what_fails_inside_is_no_fault_of_the_lock(lock: Path) -> None:
    with pytest.raises(PermissionError, match="not the lock"), measuring.alone():
        raise PermissionError("not the lock")
