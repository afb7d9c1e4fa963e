"""``benchmarks/node.sh`` on CPU ranks, for real; its rules: ``tests/unit/test_node_steps.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fusewise.profiles import store

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "node.sh"
SMALL = {"TUNE": "--hidden 64 --min-bytes 1K --max-bytes 2K --budget 1s --rounds 5"}


def run(*words: str) -> str:
    here = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(SCRIPT), *words], env=os.environ | here | SMALL, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_cpu_ranks_leave_a_profile_and_tables_and_are_not_asked_twice(tmp_path: Path) -> None:
    told = run(str(tmp_path), "tune", "kernels")
    assert "kernels, 2 ranks: needs 2 GPUs, this machine has 0, skipped" in told
    profile = store.load(tmp_path / "profile_tp2.json")
    assert {sample.hidden_size for sample in profile.samples} == {64}
    assert told.endswith((tmp_path / "tables.txt").read_text())
    assert "Measurements: all_reduce_rms_norm" in told
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name for file in files} == {
        "profile_tp2.json", "tune.log", "tune_tp2.svg", "tables.txt",
    }  # fmt: skip

    assert "tune, 2 ranks: profile_tp2.json is there, skipped" in run(str(tmp_path), "tune")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
