"""``benchmarks/node.sh`` on CPU ranks: what runs, what is skipped and why, and a second run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fusewise.profiles import store

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "node.sh"
SMALL = {
    "VERIFY": "--dtype bf16 --hidden 64 --backend shm.one_shot",
    "TUNE": "--hidden 64 --min-bytes 1K --max-bytes 2K --budget 2s --rounds 5",
}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(SCRIPT), *words], env=os.environ | variables | SMALL | environment,
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_steps_run_resume_and_say_what_they_lack(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    kept = out / "verify_tp2.json"
    kept.write_text("of an earlier run")

    done = run(str(out), "verify", "tune", "kernels", "decode")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verify, 2 ranks: verify_tp2.json is there, skipped" in done.stdout
    assert "kernels, 2 ranks: needs 2 GPUs, this machine has 0, skipped" in done.stdout
    assert "decode, 2 ranks: needs 2 GPUs, this machine has 0, skipped" in done.stdout
    made = {"verify_tp2.json", "profile_tp2.json", "tune_tp2.svg", "tune.log", "tables.txt"}
    assert files(out) == made
    assert kept.read_text() == "of an earlier run"
    profile = store.load(out / "profile_tp2.json")
    assert {sample.hidden_size for sample in profile.samples} == {64}
    assert "shm.one_shot" in (out / "tables.txt").read_text()
    assert "shm.one_shot" in done.stdout  # the tables, last

    measured = (out / "profile_tp2.json").read_bytes()
    again = run("--again", str(out), "verify")
    assert again.returncode == 0, again.stdout + again.stderr
    (row,) = json.loads(kept.read_text())["verify"]["rows"]
    assert (row["backend"], row["verdict"]) == ("shm.one_shot", "pass")
    assert files(out) == made | {"verify.log"}
    assert (out / "profile_tp2.json").read_bytes() == measured


def test_a_step_that_fails_is_told_with_its_log_and_the_next_ones_run(tmp_path: Path) -> None:
    done = run(str(tmp_path), "verify", "kernels", VERIFY="--backend none")
    assert done.returncode == 2
    assert "verify, 2 ranks: exit code 2" in done.stdout
    assert "none" in (tmp_path / "verify.log").read_text()
    assert "kernels, 2 ranks: needs 2 GPUs" in done.stdout
    assert files(tmp_path) == {"verify.log", "tables.txt"}


def test_what_does_not_fit_is_left_to_the_next_run(tmp_path: Path) -> None:
    done = run(str(tmp_path), "verify", LIMIT_S="5")
    assert (done.returncode, files(tmp_path)) == (124, {"tables.txt"})
    assert "verify, 2 ranks: no time left" in done.stdout


def test_an_unknown_step_runs_none(tmp_path: Path) -> None:
    done = run(str(tmp_path / "out"), "verify", "two")
    assert (done.returncode, done.stdout) == (2, "")
    assert "verify tune kernels decode vllm" in done.stderr
    assert not (tmp_path / "out").exists()
