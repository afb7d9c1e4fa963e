"""What the reading commands print on the packaged profiles, byte for byte as it was recorded.

Record anew, on purpose, with: ``python -m tests.unit.test_recorded_output``.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.command_line import run

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
    foreign = [name for name in os.environ if name.startswith(("FUSEWISE_", "VLLM_"))]
    settled = {"COLUMNS": "160", "NO_COLOR": "1", "FUSEWISE_HOME": "/nonexistent"}
    words = COMMANDS[command].format(profile=profile).split()
    return run(*words, "--format", fmt, env=dict.fromkeys(foreign) | settled)[0]


def place(command: str, profile: str, fmt: str) -> Path:
    return RECORDED / f"{command}-{profile}.{fmt}"


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_prints_what_was_recorded(case: tuple[str, str, str]) -> None:
    assert printed(*case) == place(*case).read_text("utf-8")


if __name__ == "__main__":
    for one in CASES:
        place(*one).write_text(printed(*one), "utf-8")
