"""``fusewise verify`` on this machine's GPUs, a GPU per rank or shared, at 2, 4 and 8 ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]

# A backend that does not run must lack one of these, and nothing else.
MISSING = ("one rank per GPU", "multicast", "NVLink", "not installed", "nvcc", "is written for")


def fusewise(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusewise", *arguments], env=os.environ | changes,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_backend_that_can_run_here_is_right(ranks: int) -> None:
    done = fusewise(
        "verify", "--ranks", str(ranks), "--hidden", "2880", "--dtype", "bf16,fp32",
        "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["backend"]: row for row in json.loads(done.stdout)["verify"]["rows"]}
    passed = {name for name, row in rows.items() if row["verdict"] == "pass"}
    assert "symm_mem.one_shot" in passed
    for name, row in rows.items():
        if name in passed:
            assert row["eager_cases"] > 15
            assert row["captured_cases"] == (0 if name == "gloo" else row["eager_cases"])
        else:
            assert any(word in row["reason"] for word in MISSING), row


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="a GPU each: NVLink or PCIe is there")
@pytest.mark.parametrize("command", ["tune", "bench", "decode"])
def test_what_takes_times_refuses_to_share(command: str) -> None:
    for more in ((), ("--tp", "2")):
        done = fusewise(command, *more)
        assert done.returncode in (2, 3)
        assert "their times mean nothing; `fusewise verify`" in done.stderr


def test_memory_that_cannot_be_shared_costs_the_backend_that_needs_it_only() -> None:
    done = fusewise(
        "verify", "--ranks", "2", "--hidden", "2048", "--dtype", "bf16", "--format", "json",
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["backend"]: row for row in json.loads(done.stdout)["verify"]["rows"]}
    assert rows["custom"]["verdict"] == "not here"
    assert rows["symm_mem.one_shot"]["verdict"] == "pass"
