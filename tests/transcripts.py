"""What the README shows of the commands, made by running them.

``python -m tests.transcripts`` writes it anew. What ``make tune`` prints comes from a profile that
was measured on two CPU ranks (``tests/data/readme``); everything else from packaged profiles.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from fusewise.commands.after_tune import what_now
from fusewise.commands.app import app
from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.report.records import tables
from fusewise.report.text import as_text, render_sections

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_CPU_RANKS = ROOT / "tests" / "data" / "readme" / "two_cpu_ranks.json"
_BLOCK = re.compile(r"```console\n\$ ([^\n]*)\n(.*?)```", re.DOTALL)
_WIDTH = 80


def tuned() -> str:
    """What ``tune`` prints of the recorded profile."""
    profile = store.load(_CPU_RANKS)
    said = "\n".join(f"fusewise: {line}" for line in what_now(profile, None))
    return f"{as_text(tables(profile, derive(profile)), _WIDTH)}\n{said}\n"


def run(words: str) -> str:
    """What a command prints on a terminal of 80 columns."""
    on_terminal = functools.partial(render_sections, terminal=True)
    environ = {"COLUMNS": str(_WIDTH), "NO_COLOR": "1"}
    with mock.patch("fusewise.commands.output.render_sections", on_terminal):
        result = CliRunner().invoke(app, words.split()[1:], env=environ)
    assert result.exit_code == 0, result.output
    return result.stdout


def excerpt(text: str, kept: Mapping[str, int]) -> str:
    """The paragraphs that begin so, each as long as said; ``...`` for what is left out."""
    shown: list[str] = []
    for paragraph in text.rstrip("\n").split("\n\n"):
        lines = paragraph.split("\n")
        count = next((n for head, n in kept.items() if lines[0].startswith(head)), 0)
        if count and shown and shown[-1] != "...":
            shown.append("")
        shown += lines[:count]
        if count < len(lines) and shown[-1:] != ["..."]:
            shown.append("...")
    return "\n".join(shown) + "\n"


# Command → how what it prints is shown.
TRANSCRIPTS: Mapping[str, Callable[[], str]] = {
    "make tune": lambda: excerpt(
        tuned(), {"Measurements: all_reduce_rms_norm": 6, "Decision: all_reduce_rms_norm": 4,
                  "fusewise: ": 3},
    ),
    "fusewise cap --profile nvidia-h200-tp2 --version 0.33": lambda: run(
        "fusewise cap --profile nvidia-h200-tp2 --version 0.33"
    ),
    "fusewise audit --profile nvidia-h200-tp8 --version 0.22": lambda: excerpt(
        run("fusewise audit --profile nvidia-h200-tp8 --version 0.22"),
        {"Audit": 20, "Measured sizes": 7},
    ),
}  # fmt: skip


def shown(text: str) -> dict[str, str]:
    """Command → what a document shows of it."""
    return dict(_BLOCK.findall(text))


def written(text: str) -> str:
    """The document with every transcript made anew."""
    return _BLOCK.sub(lambda block: f"```console\n$ {block[1]}\n{TRANSCRIPTS[block[1]]()}```", text)


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8")), "utf-8")
