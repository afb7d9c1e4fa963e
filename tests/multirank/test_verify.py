"""``fusewise verify`` end to end on CPU ranks, and what it is asked wrongly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

VERIFY = [sys.executable, "-m", "fusewise", "verify"]


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FUSEWISE_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*VERIFY, *arguments], env=environment, capture_output=True, text=True, timeout=110,
        check=False,
    )  # fmt: skip


def test_cpu_ranks_pass_and_nothing_is_written(tmp_path: Path) -> None:
    done = run(tmp_path, "--ranks", "3", "--hidden", "64", "--format", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    rows = {row["backend"]: row for row in told["verify"]["rows"]}
    assert rows.keys() == {"gloo", "shm.one_shot"}
    for row in rows.values():
        assert (row["verdict"], row["first_failure"]) == ("pass", None)
        assert row["eager_cases"] > 60
        assert row["captured_cases"] == 0  # CPU ranks have no graphs
        assert 0 < row["relative_error_eps"] < 1
    assert not any(key.endswith("_us") for row in rows.values() for key in row)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--backend", "flashinfr"), 2, "unknown backend"),
        (("--backend", "nccl"), 2, "no such backend where these ranks run"),
        (("--without", "gloo,shm", "--backend", "gloo"), 2, "nothing is left to verify"),
        (("--ranks", "4000"), 2, "cannot start that many ranks"),
        (("--hidden", "7"), 2, "hidden sizes out of range"),
        (("--dtype", "int8"), 2, "unknown dtype"),
    ],
)
def test_bad_words_are_refused_before_any_rank_starts(
    tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_an_interruption_reaps_the_ranks(tmp_path: Path) -> None:
    environment = os.environ | {"FUSEWISE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    mark = f"FUSEWISE_TEST_RUN=verify-{os.getpid()}"
    environment |= dict([mark.split("=")])
    with subprocess.Popen(VERIFY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "0/36" not in process.stderr.readline() and process.poll() is None:
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert "interrupted" in said
    assert _carrying(mark) == []


def _carrying(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found
