"""What the README shows is true: its example runs as printed, its links and commands exist."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusewise.commands.app import app
from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.report import plot
from tests import transcripts
from tests.example_runs import environment, torchrun_words
from tests.ranks import run_torchrun

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_python_example_runs_as_printed(tmp_path: Path) -> None:
    for _ in range(3):  # it used to abort at exit in 12 of 27 runs
        printed = run_torchrun(*torchrun_words(tmp_path), environ=environment(tmp_path))
        assert printed.count("rms_norm") == 2, "every rank prints its decision"


def test_the_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"^fusewise ([a-z]+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert named >= {"show", "explain", "audit", "cap", "doctor", "bench"}
    for command in named:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("command", transcripts.TRANSCRIPTS)
def test_a_transcript_is_what_the_command_prints(command: str) -> None:
    """Made anew with: ``python -m tests.transcripts``."""
    assert transcripts.shown(TEXT)[command] == transcripts.TRANSCRIPTS[command]()


def test_every_transcript_of_the_readme_is_compared() -> None:
    assert set(transcripts.shown(TEXT)) == set(transcripts.TRANSCRIPTS)
    assert transcripts.written(TEXT) == TEXT


def test_an_excerpt_marks_what_it_leaves_out() -> None:
    text = "A\n1\n2\n\nB\n3\n\nC\n"
    assert transcripts.excerpt(text, {"A": 2, "C": 1}) == "A\n1\n...\nC\n"
    assert transcripts.excerpt(text, {"A": 3, "B": 2}) == "A\n1\n2\n\nB\n3\n...\n"
    assert transcripts.excerpt(text, {"B": 2}) == "...\nB\n3\n...\n"


def test_the_picture_is_the_one_that_the_measurement_gives(tmp_path: Path) -> None:
    """Variants of our kernels would lie on top of each other."""
    measured = store.load(ROOT / "benchmarks/results/two_gpus/profile_tp2.json")
    paths = tuple(path for path in measured.paths if ":" not in path.name)
    samples = tuple(sample for sample in measured.samples if ":" not in sample.path)
    profile = measured.model_copy(update={"paths": paths, "samples": samples})
    plot.save(profile, derive(profile), tmp_path / "again.svg")
    shown = ROOT / "docs" / "images" / "h200-tp2.svg"
    assert (tmp_path / "again.svg").read_text("utf-8") == shown.read_text("utf-8")


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def on_a_terminal(command: str, columns: int, lines: int) -> list[str]:
    """What a real terminal of that size is sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    words = [sys.executable, "-m", "fusewise", *command.split()[1:]]
    sent = b""
    with subprocess.Popen(
        words, stdout=theirs, stderr=subprocess.DEVNULL, env=environ | {"NO_COLOR": "1"}, cwd=ROOT
    ):
        os.close(theirs)
        try:
            while part := os.read(ours, 65536):
                sent += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return sent.decode().replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize(
    "command",
    [
        "fusewise show --profile tests/data/readme/two_cpu_ranks.json",
        *(words for words in transcripts.TRANSCRIPTS if words.startswith("fusewise")),
    ],
)
def test_every_table_of_the_readme_is_unbroken_on_a_terminal_of_80_by_24(command: str) -> None:
    sent = on_a_terminal(command, 80, 24)
    assert sent
    assert [line for line in sent if len(line) > 80 and not line.startswith("--")] == []
