"""The command line called in this process, and its answers taken apart."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from fusewise.commands.app import app

SEED = ("--profile", "nvidia-h200-tp8")


def run(
    *arguments: str, code: int = 0, env: dict[str, str | None] | None = None
) -> tuple[str, str]:
    result = CliRunner().invoke(app, arguments, env=env)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def answer(*arguments: str, table: str | None = None) -> Any:
    """The one row of a table of a JSON answer; the command's own table by default."""
    document = json.loads(run(*arguments, "--format", "json")[0])
    (row,) = document[table or arguments[0]]["rows"]
    return row


def facts(*arguments: str) -> Any:
    return answer(*arguments, table="summary")
