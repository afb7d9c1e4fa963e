"""The tune end to end on CPU ranks: by its own spawner, under torchrun, on two torchrun nodes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile
from tests.ranks import run_torchrun

SMALL = (
    "tune", "--hidden", "64,128", "--min-bytes", "1K", "--max-bytes", "16K", "--budget", "4s",
    "--rounds", "7", "--format", "json",
)  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    mine = {"FUSEWISE_HOME": home, "FUSEWISE_MEASURING_LOCK": home / "measuring.lock"}
    return os.environ | {name: str(path) for name, path in mine.items()} | {"OMP_NUM_THREADS": "1"}


def profiles(home: Path) -> list[Profile]:
    return [store.load(path) for path in sorted((home / "profiles").glob("device=*.json"))]


def run(command: list[str], home: Path) -> tuple[str, str]:
    done = subprocess.run(
        command, env=environment(home), capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def check(profile: Profile) -> None:
    """A whole profile of two CPU ranks: both paths, both operations, and a plan from it."""
    assert profile.fingerprint.device_type == "cpu"
    assert (profile.fingerprint.world_size, profile.fingerprint.fabric) == (2, "shm")
    assert {path.name for path in profile.paths} == {"gloo + rms_norm", "shm.one_shot"}
    assert {sample.op for sample in profile.samples} >= {"all_reduce_rms_norm"}
    assert all(len(sample.times_us) == 7 for sample in profile.samples)
    assert derive(profile).tables


def test_tune_and_bench_by_our_own_spawner(tmp_path: Path) -> None:
    def points(profile: Profile) -> set[tuple[str, int, int]]:
        return {(s.op, s.num_tokens, s.hidden_size) for s in profile.samples}

    few = [*SMALL, "--budget", "0.1s"]
    _, err = run([sys.executable, "-X", "importtime", "-m", "fusewise", *few], tmp_path)
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", err, re.MULTILINE))
    assert "fusewise" in imported
    assert "torch" not in imported, "what starts ranks has no use for it"
    assert "0.1 s were not enough: 2 of 15 points are measured. Not reached:" in err
    assert "Run the same command again: it goes on with these." in err
    assert "Look at it: `fusewise show`" in err
    (first,) = profiles(tmp_path)
    assert len(points(first)) == 2
    out, err = run([sys.executable, "-m", "fusewise", *few], tmp_path)
    assert f"extending what was measured {first.provenance.created}" in err
    assert "4 of 15" in err, "what was missing came first, and what was there is kept"
    out, err = run([sys.executable, "-m", "fusewise", *SMALL, "--budget", "90s"], tmp_path)
    assert json.loads(out)["bands"]["rows"]
    assert "left" in err and "not enough" not in err
    (profile,) = profiles(tmp_path)
    assert len(points(profile)) >= 15
    check(profile)
    bench = ["bench", "--hidden", "64", "--max-bytes", "8K", "--rounds", "5", "--format", "json"]
    out, _ = run([sys.executable, "-m", "fusewise", *bench], tmp_path)
    rows: list[dict[str, Any]] = json.loads(out)["bench"]["rows"]
    assert {row["path"] for row in rows} == {
        "gloo", "gloo + rms_norm", "shm.one_shot",
    }  # fmt: skip
    assert {row["wrong"] for row in rows} == {0}
    assert all(row["time_low_us"] <= row["time_us"] <= row["time_high_us"] for row in rows)
    assert {(row["hidden_size"], row["num_tokens"]) for row in rows} == {(64, 32), (64, 64)}
    assert all(row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"]) for row in rows)


def torchrun(home: Path, *arguments: str) -> str:
    return run_torchrun(*arguments, "-m", "fusewise", *SMALL, environ=environment(home))


def test_torchrun_does_the_same(tmp_path: Path) -> None:
    out = torchrun(tmp_path, "--nproc-per-node", "2")
    assert json.loads(out)["bands"]["rows"], "one rank prints, once"
    (profile,) = profiles(tmp_path)
    check(profile)


def test_two_torchrun_nodes_share_one_measurement_of_one_fabric(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    homes = [tmp_path / str(node) for node in range(2)]

    def run_node(node: int) -> str:
        return torchrun(
            homes[node],
            "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2",
            "--master-addr", "127.0.0.1", "--master-port", str(port),
        )  # fmt: skip

    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(run_node, range(2)))
    assert json.loads(printed[0])["bands"]["rows"]
    assert printed[1] == "", "only the first of all ranks prints"
    (first,), (second,) = (profiles(home) for home in homes)
    check(first)
    assert first == second, "measured once, written by both nodes"
