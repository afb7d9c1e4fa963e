"""``benchmarks/node.sh`` on CPU ranks, for real; its rules: ``tests/unit/test_node_steps.py``."""

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
    "TUNE": "--hidden 64 --min-bytes 1K --max-bytes 2K --budget 1s --rounds 5",
}


def run(*words: str) -> str:
    here = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(SCRIPT), *words], env=os.environ | here | SMALL, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_cpu_ranks_leave_a_profile_a_verdict_and_tables_and_are_not_asked_twice(
    tmp_path: Path,
) -> None:
    told = run(str(tmp_path), "verify", "tune", "kernels")
    assert "kernels, 2 ranks: needs 2 GPUs, this machine has 0, skipped" in told
    (row,) = json.loads((tmp_path / "verify_tp2.json").read_text())["verify"]["rows"]
    assert (row["backend"], row["verdict"]) == ("shm.one_shot", "pass")
    profile = store.load(tmp_path / "profile_tp2.json")
    assert {sample.hidden_size for sample in profile.samples} == {64}
    assert told.endswith((tmp_path / "tables.txt").read_text())
    assert "Measurements: all_reduce_rms_norm" in told
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name for file in files} == {
        "verify_tp2.json", "verify.log", "profile_tp2.json", "tune.log", "tune_tp2.svg",
        "tables.txt",
    }  # fmt: skip

    told = run(str(tmp_path), "verify", "tune")
    assert "verify, 2 ranks: verify_tp2.json is there, skipped" in told
    assert "tune, 2 ranks: profile_tp2.json is there, skipped" in told
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
