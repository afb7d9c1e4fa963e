"""What the reading commands print on the packaged profiles, byte for byte as it was recorded.

Record anew, on purpose, with: ``python -m tests.unit.test_recorded_output``.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

RECORDED = Path(__file__).parents[1] / "data" / "recorded"
COMMANDS = {
    "show": "show {profile}",
    "audit": "audit --engine vllm --version 0.33 --profile {profile}",
    "cap": "cap --engine vllm --version 0.33 --profile {profile}",
    "explain": "explain 256K --profile {profile}",
}
PROFILES = ("nvidia-h200-tp2", "nvidia-h200-tp8")
FORMATS = ("table", "json", "csv", "md")
CASES = list(itertools.product(COMMANDS, PROFILES, FORMATS))


def printed(command: str, profile: str, fmt: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEWISE_", "VLLM_"))}
    settled = {"COLUMNS": "160", "NO_COLOR": "1", "FUSEWISE_HOME": "/nonexistent"}
    words = COMMANDS[command].format(profile=profile).split()
    done = subprocess.run(
        [sys.executable, "-m", "fusewise", *words, "--format", fmt],
        env=inherited | settled, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def place(command: str, profile: str, fmt: str) -> Path:
    return RECORDED / f"{command}-{profile}.{fmt}"


@pytest.fixture(scope="module")
def outputs() -> dict[tuple[str, str, str], str]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(lambda case: printed(*case), CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_prints_what_was_recorded(
    case: tuple[str, str, str], outputs: dict[tuple[str, str, str], str]
) -> None:
    assert outputs[case] == place(*case).read_text("utf-8")


if __name__ == "__main__":
    for one in CASES:
        place(*one).write_text(printed(*one), "utf-8")
