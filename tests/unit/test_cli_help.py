"""Help that teaches, exit codes that are listed, and a doctor that never fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import fusewise
from fusewise.commands import options
from fusewise.commands.app import app
from fusewise.errors import EXIT_CODES, FusewiseError
from tests.command_line import run

pytestmark = pytest.mark.usefixtures("own_home")


def test_output_is_a_file_wherever_it_is_an_option() -> None:
    helps = [
        parameter.help
        for command in ALL.values()
        for parameter in command.params
        if "--output" in parameter.opts
    ]
    assert helps
    assert all(re.search(r"JSON|file", text) and "older" not in text for text in helps)


def test_the_doctor_goes_on_when_the_named_profile_is_ill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWISE_PROFILE", "nope")
    out, _ = run("doctor")
    assert "cannot read profile nope" in out
    assert "shm.one_shot" in out


@pytest.mark.parametrize(
    "name",
    [
        "FUSEWISE_CAP",
        "FUSEWISE_VLLM",
        "FUSEWISE_SGLANG",
        "FUSEWISE_DEBUG",
        "FUSEWISE_REPLAY_TIMEOUT_S",
    ],
)
def test_the_doctor_says_what_is_wrong_with_a_variable(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"{name}: " not in run("doctor")[0]
    monkeypatch.setenv(name, "neither")
    assert f"{name}: " in run("doctor")[0]
    notes = json.loads(run("doctor", "-f", "json")[0])["node"]["notes"]
    assert len(notes) == 1
    assert "neither" in notes[0]


def test_help_teaches_and_names_the_exit_codes() -> None:
    out = " ".join(run("--help")[0].split())
    for word in (
        "tune",
        "bench",
        "show",
        "explain",
        "audit",
        "cap",
        "doctor",
        "130 interrupted",
        *(f"{code} {what}".split(":")[0] for code, what in EXIT_CODES.items()),
    ):
        assert word in out
    assert "torchrun --nproc-per-node 8 -m fusewise tune" in " ".join(
        run("tune", "--help")[0].split()
    )


def test_the_exit_code_of_every_error_is_in_the_table() -> None:
    kinds = [FusewiseError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.exit_code for kind in kinds} | {0, 130} == set(EXIT_CODES)
    assert options.INTERRUPTED in EXIT_CODES


def test_version_and_the_short_help() -> None:
    assert run("--version")[0] == f"fusewise {fusewise.__version__}\n"
    assert run("-h")[0] == run("--help")[0]
    assert run("vllm", "check", "-h")[0] == run("vllm", "check", "--help")[0]
    assert "--show-completion" in run("--help")[0]


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, group
    for name, one in getattr(group, "commands", {}).items():
        yield from commands(one, *names, name)


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("names", ALL, ids=lambda names: " ".join(names) or "fusewise")
def test_help_fits_80_columns_and_never_cuts_an_options_name(names: tuple[str, ...]) -> None:
    out, _ = run(*names, "--help", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "…" not in out
    assert "..." not in out.partition("Commands:")[2], "a command's line says its whole sentence"
    for parameter in ALL[names].params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert not name.startswith("-") or name in out, name


def test_doctor_gives_every_backend_a_reason_or_none() -> None:
    from fusewise.backends.registry import all_ids

    document = json.loads(run("doctor", "-f", "json")[0])
    rows = {row["backend"]: row for row in document["backends"]["rows"]}
    assert list(rows) == all_ids()
    for row in rows.values():
        assert row["available"] == (row["reason"] is None)
    assert rows["gloo"]["available"]
    assert "GPU" in rows["nccl"]["reason"]


# For every interpreter that is started: the command's own, and the one that its ranks come from.
_ABSENT = "import sys\nsys.modules['torch'] = None\n"
_BROKEN = """
import sys
from importlib import abc
class Broken(abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("libfoo.so", name="torch._C")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("how", [_ABSENT, _BROKEN], ids=["absent", "broken"])
def test_without_torch_the_doctor_says_so_and_the_rest_is_one_line(
    how: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(how)
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = "torch cannot be imported" if how is _ABSENT else "libfoo.so"

    def ran(*command: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "fusewise", *command]
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=False)

    doctor = ran("doctor", "-f", "json")
    assert doctor.returncode == 0, doctor.stderr
    rows = json.loads(doctor.stdout)["backends"]["rows"]
    assert len(rows) > 8
    assert all(said in row["reason"] and not row["available"] for row in rows)
    tune = ran("tune", "--budget", "1", "--hidden", "64")
    assert (tune.returncode, tune.stdout) == (3, "")
    assert said in tune.stderr
    assert "Traceback" not in tune.stderr
