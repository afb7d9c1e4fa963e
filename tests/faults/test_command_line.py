"""The command under fire: Ctrl-C, a killed rank, a killed supervisor. Nothing half, no orphan."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TUNE = [
    sys.executable, "-m", "fusewise", "tune", "--hidden", "2048", "--budget", "60s",
    "--rounds", "201",
]  # fmt: skip


def _processes(home: Path, names: tuple[str, ...]) -> list[int]:
    """Processes so named (``ps -o comm``) that were started with this home."""
    mark, found = f"FUSEWISE_HOME={home}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            zombie = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            ours = mark in (folder / "environ").read_bytes()
            named = (folder / "comm").read_text().startswith(names)
            if ours and not zombie and named:
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


def _ranks(home: Path) -> list[int]:
    return _processes(home, ("fusewise-rank",))


def _measuring(home: Path) -> subprocess.Popen[str]:
    """A tune that has started to measure."""
    process = subprocess.Popen(
        TUNE,
        env=os.environ | {"FUSEWISE_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "all_reduce_rms_norm" in line:
            return process
    raise AssertionError(f"the tune ended early with {process.wait()}")


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def _gone(home: Path) -> bool:
    deadline = time.monotonic() + 20
    while _processes(home, ("fusewise-", "python")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not _processes(home, ("fusewise-", "python"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_means_130_no_profile_and_no_child(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = _measuring(tmp_path)
    assert len(_ranks(tmp_path)) == 2
    process.send_signal(number)
    code, out, err = _end(process)
    assert (code, out) == (130, "")
    assert "interrupted; nothing was written" in err
    assert _gone(tmp_path)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_killed_rank_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    process = _measuring(tmp_path)
    os.kill(_ranks(tmp_path)[-1], signal.SIGKILL)
    code, out, err = _end(process)
    assert (code, out) == (4, "")
    assert "was killed by SIGKILL" in err
    assert "Nothing was written" in err
    assert _gone(tmp_path)
    assert list(tmp_path.rglob("*.json")) == []


def test_ranks_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    process = _measuring(tmp_path)
    process.kill()
    _end(process)
    assert _gone(tmp_path)


@pytest.mark.parametrize("lost", ["2>&-", "2>/dev/full", "2>&1 >OUT | head -c 1 >/dev/null"])
def test_a_tune_outlives_the_reader_of_its_progress(lost: str, tmp_path: Path) -> None:
    tune = f"{sys.executable} -m fusewise tune --budget 1s -e 8K --rounds 5"
    line = f"set -o pipefail; {tune} {lost}".replace("OUT", str(tmp_path / "out"))
    environment = os.environ | {"FUSEWISE_HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", line], env=environment, stdout=subprocess.PIPE, timeout=60, check=True
    )
    said = done.stdout or (tmp_path / "out").read_bytes()
    assert b"Measurements" in said and b"fusewise:" not in said
    assert list((tmp_path / "profiles").glob("*.json"))


@pytest.mark.parametrize("words", ["profile export nvidia-h200-tp8", "report -o -", "--help"])
def test_a_stdout_that_takes_nothing_is_an_error_in_one_line(words: str) -> None:
    for lost in (">&-", ">/dev/full") if words != "--help" else (">/dev/full",):
        line = f"FUSEWISE_PROFILE=nvidia-h200-tp8 {sys.executable} -m fusewise {words} {lost}"
        done = subprocess.run(
            ["bash", "-c", line], stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr


def test_an_interface_that_is_not_there_is_named(tmp_path: Path) -> None:
    environ = {"FUSEWISE_HOME": str(tmp_path), "GLOO_SOCKET_IFNAME": "nope0"}
    done = subprocess.run(
        [sys.executable, "-m", "fusewise", "bench", "--hidden", "64", "-e", "8K"],
        env=os.environ | environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert re.search(r"GLOO_SOCKET_IFNAME: expected of .*lo.*, got nope0", done.stderr)
    assert "Traceback" not in done.stderr
