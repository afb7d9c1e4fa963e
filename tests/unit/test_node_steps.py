"""``benchmarks/node.sh``: which commands it gives to how many GPUs, with an interpreter that only
takes notes. The commands themselves run in ``tests/multirank/test_node_script.py``."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "node.sh"
STEPS = ("verify", "tune", "kernels", "decode", "vllm")
# Answers how many GPUs there are, notes every other call, and leaves the file that was asked for.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
  *gpu_count*) echo "$GPUS"; exit ;;
  *find_spec*) exit ;;
esac
echo "$NCCL_NVLS_ENABLE$TORCH_SYMM_MEM_DISABLE_MULTICAST$NVSHMEM_DISABLE_NVLS $*" >>"$CALLS"
previous=
for word in "$@"; do
  case $previous in
    --out | --output) echo '{}' >"$word"; echo '<svg/>' >"${word%.json}.svg" ;;
    --into) mkdir -p "$word" && echo '{}' >"$word/device=any,tp=any.json" ;;
  esac
  previous=$word
done
[[ $* != *verify* ]] || echo '{}'
[[ -z ${FAIL-} || $* != *$FAIL* ]] || exit 9
"""
NAMES = {
    "-m fusewise verify": "verify", "-m fusewise tune": "tune",
    "-m torch.distributed.run": "kernels", "benchmarks/decode_h200.py": "decode",
    "benchmarks/vllm_ab.py": "vllm",
}  # fmt: skip


class Node:
    """A machine with so many GPUs, and what was called on it."""

    def __init__(self, folder: Path, gpus: int) -> None:
        self.folder, self.out, self._calls = folder, folder / "out", folder / "calls"
        python = folder / "python"
        python.write_text(INTERPRETER)
        python.chmod(0o755)
        self._environment = os.environ | {
            "PYTHON": str(python), "CALLS": str(self._calls), "GPUS": str(gpus),
        }  # fmt: skip

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        self._calls.write_text("")
        done = subprocess.run(
            [str(SCRIPT), *words], env=self._environment | environment,
            capture_output=True, text=True, timeout=60, check=False, cwd=self.folder,
        )  # fmt: skip
        return done.returncode, done.stdout

    def measured(self) -> list[tuple[str, int]]:
        """(step, ranks) in the order of the calls; multicast was off in each."""
        found = []
        for line in self._calls.read_text().splitlines():
            assert line.startswith("011 ")
            ranks = re.search(r"--(?:ranks|tp|nproc-per-node) (\d+)", line)
            found += [(name, int(ranks[1])) for c, name in NAMES.items() if c in line and ranks]
        return found

    def files(self) -> set[str]:
        return {file.name for file in self.out.iterdir() if file.suffix == ".json"}


def test_eight_gpus_are_asked_in_the_order_given_the_largest_group_first(tmp_path: Path) -> None:
    node = Node(tmp_path, 8)
    code, told = node.run(str(node.out), *STEPS)
    assert code == 0, told
    groups = {"verify": (8,), "tune": (8, 4, 2), "kernels": (8, 4, 2), "decode": (8,), "vllm": (8,)}
    assert node.measured() == [(step, ranks) for step in STEPS for ranks in groups[step]]
    assert node.files() == {
        "verify_tp8.json", "decode_tp8.json", "vllm_ab_tp8.json",
        *(f"{name}_tp{n}.json" for name in ("profile", "native_kernels") for n in (8, 4, 2)),
    }  # fmt: skip

    (node.out / "native_kernels_tp4.json").unlink()
    assert node.run(str(node.out), *STEPS)[0] == 0
    assert node.measured() == [("kernels", 4)]
    assert node.run("--again", str(node.out), "decode")[0] == 0
    assert node.measured() == [("decode", 8)]


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 2), (2, 2), (3, 2), (4, 4), (7, 4)])
def test_a_smaller_machine_is_asked_what_it_can_answer(
    tmp_path: Path, gpus: int, ranks: int
) -> None:
    node = Node(tmp_path, gpus)
    code, told = node.run(str(node.out), "verify", "tune")
    assert code == 0
    tuned = [n for n in (4, 2) if n <= ranks] if gpus > 1 else []
    assert node.measured() == [("verify", ranks), *(("tune", n) for n in tuned)]
    assert ("tune, 2 ranks: needs 2 GPUs, this machine has 1, skipped" in told) == (gpus == 1)


def test_ranks_may_share_one_gpu_for_verify(tmp_path: Path) -> None:
    node = Node(tmp_path, 1)
    assert node.run(str(node.out), "verify", "kernels", RANKS="8")[0] == 0
    assert node.measured() == [("verify", 8)]


def test_what_is_not_whole_is_kept_apart_and_asked_again(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)
    code, told = node.run(str(node.out), "kernels", "decode", FAIL="native_kernels.py")
    assert code == 9
    assert "kernels, 2 ranks: exit code 9" in told
    assert "decode, 2 ranks: needs profile_tp2.json: run tune first, skipped" in told
    assert node.files() == {"native_kernels_tp2.part.json"}
    assert node.run(str(node.out), "kernels")[0] == 0
    assert node.measured() == [("kernels", 2)]
    assert node.files() == {"native_kernels_tp2.json"}


def test_a_decode_cut_short_leaves_the_sizes_it_came_to(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)
    code, told = node.run(str(node.out), "tune", "decode", FAIL="decode_h200.py")
    assert code == 9
    assert "decode, 2 ranks: exit code 9" in told
    assert node.files() == {"profile_tp2.json", "decode_tp2.part.json"}
    assert (node.out / "decode_tp2.svg").exists()


def test_what_does_not_fit_is_left_to_the_next_run(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)
    code, told = node.run(str(node.out), "verify", LIMIT_S="5")
    assert (code, node.measured()) == (124, [])
    assert "verify, 2 ranks: no time left" in told


@pytest.mark.parametrize("words", [["out", "verify", "two"], ["out"], ["--fresh", "out", "tune"]])
def test_bad_words_measure_nothing(tmp_path: Path, words: list[str]) -> None:
    node = Node(tmp_path, 2)
    assert node.run(*words) == (2, "")
    assert node.measured() == []
    assert not node.out.exists()
