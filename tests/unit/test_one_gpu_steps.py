"""``benchmarks/one_gpu.sh``: commands, logs and bounds, with an interpreter that takes notes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "one_gpu.sh"
INTERPRETER = """#!/usr/bin/env bash
off=$NCCL_NVLS_ENABLE$TORCH_SYMM_MEM_DISABLE_MULTICAST$NVSHMEM_DISABLE_NVLS
echo "$off ${0##*/} $*" >>"$CALLS"
echo said >&2
echo '{}'
[[ -z ${FAIL-} || $* != *$FAIL* ]] || exit 9
[[ -z ${HANG-} || $* != *$HANG* ]] || exec sleep 100
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.out, self.calls = folder / "out", folder / "calls"
        self.calls.touch()
        for name in ("python", "compute-sanitizer"):
            (folder / name).write_text(INTERPRETER)
            (folder / name).chmod(0o755)
        self._environment = os.environ | {
            "PYTHON": str(folder / "python"), "CALLS": str(self.calls),
            "PATH": f"{folder}:{os.environ['PATH']}",
        }  # fmt: skip

    def run(self, *steps: str, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [str(SCRIPT), str(self.out), *steps], env=self._environment | environment,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    def log(self, name: str) -> list[str]:
        return (self.out / f"{name}.log").read_text().splitlines()


def test_every_step_leaves_a_log_with_its_command_and_its_end(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    code, _ = machine.run("tests", "vllm", "verify", "kills", "sanitize", "soak", KILLS="--seed 7")
    assert code == 0
    logs = {file.stem for file in machine.out.glob("*.log")}
    assert logs == {
        "tests", "vllm", "verify_tp2", "verify_tp4", "verify_tp8", "kills", "racecheck",
        "initcheck", "synccheck", "soak",
    }  # fmt: skip
    for name in logs:
        command, *_, end = machine.log(name)
        assert command.startswith(("$ python ", "$ compute-sanitizer --tool "))
        assert str(tmp_path) not in command
        assert end.startswith("exit code 0 after ")
    assert machine.log("kills")[0].endswith("--kills 50 --out OUT/kills.json --seed 7")
    assert (machine.out / "verify_tp4.json").read_text() == "{}\n"
    assert machine.log("verify_tp4")[1] == "said"
    calls = machine.calls.read_text().splitlines()
    assert len(calls) == len(logs)
    assert all(call.startswith("011 ") for call in calls), "multicast stays off"


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    code, told = machine.run("verify", FAIL="--ranks 4")
    assert code == 9
    assert "one_gpu: verify_tp4: exit code 9" in told
    assert "one_gpu: verify_tp8: exit code 0" in told


def test_what_hangs_is_ended_and_nothing_starts_without_time(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    code, told = machine.run("verify", LIMIT_S="4", HANG="--ranks 2")
    assert code == 124
    assert "verify_tp2: exit code 124" in told
    assert "verify_tp4: no time left" in told
    assert len(machine.calls.read_text().splitlines()) == 1


@pytest.mark.parametrize("words", [(), ("speed",)])
def test_unknown_steps_are_refused_with_what_there_is(tmp_path: Path, words: tuple[str]) -> None:
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "sanitize  racecheck, initcheck" in done.stderr
    assert not (tmp_path / "out").exists()
