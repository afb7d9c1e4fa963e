"""What commands write: a verdict outlives its reader, and a file is whole or as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusewise.commands.after_tune import what_now
from fusewise.commands.output import check_output, write_file
from fusewise.errors import InputError, UnavailableError
from fusewise.node import probe
from fusewise.profiles import private, store
from fusewise.profiles.schema import profile_file_name
from fusewise.report.table import Column, Section, as_markdown
from fusewise.tune import supervise
from tests.command_line import run
from tests.samples import profile_of

GLOO = "gloo + rms_norm"
AUDIT = ("audit", "--profile", "nvidia-h200-tp2", "--check", "2%")


def fusewise(*arguments: str, stdout: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "fusewise", *arguments]
    return said(command, stdout)


def said(command: list[str], stdout: int | None = None) -> tuple[int, str]:
    done = subprocess.run(
        command, check=False, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_a_reader_that_went_away_changes_no_verdict() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code, words = fusewise(*AUDIT, stdout=writing)
    os.close(writing)
    assert code == 7
    assert "error: fusing loses" in words


@pytest.mark.parametrize("command", [("show", "-p", "nvidia-h200-tp2"), ("doctor",), ("bench",)])
def test_a_closed_stdout_is_said_at_once(command: tuple[str, ...]) -> None:
    code = (
        f"import os, runpy, sys; sys.argv[1:] = {list(command)!r}; os.close(1); sys.stdout = None"
    )
    script = f"{code}; runpy.run_module('fusewise', run_name='__main__')"
    code, words = said([sys.executable, "-c", script])
    assert code == 3
    assert words.endswith("stdout is closed. Redirect it to a file or a pipe.\n")


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.html"
    write_file(file, "old")
    file.chmod(0o640)
    write_file(file, "newer")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("newer", 0o640)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private.os, "fsync", full)
    with pytest.raises(UnavailableError, match=r"cannot write .*r\.html: got No space left"):
        write_file(file, "newest")
    assert file.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there")
    write_file(link, "words")
    assert link.is_symlink()
    assert (tmp_path / "there").read_text() == "words"
    check_output(link, Path(os.devnull))
    write_file(Path(os.devnull), "words")
    assert not Path(os.devnull).is_file()


def test_a_file_in_a_folder_that_takes_no_other_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mounted"
    file.write_text("old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "no other file here")

    monkeypatch.setattr(private, "write_whole", refuse)
    before = file.stat().st_ino
    write_file(file, "new")
    assert (file.read_text(), file.stat().st_ino) == ("new", before)


def test_a_link_to_nothing_is_a_file_to_be_and_one_to_itself_is_none(tmp_path: Path) -> None:
    (tmp_path / "new").symlink_to(tmp_path / "there")
    check_output(tmp_path / "new")
    assert not (tmp_path / "there").exists()
    write_file(tmp_path / "new", "words")
    assert (tmp_path / "there").read_text() == "words"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UnavailableError, match="cannot write"):
        check_output(tmp_path / "loop")


def test_two_outputs_have_a_file_each(tmp_path: Path) -> None:
    check_output(tmp_path / "a", tmp_path / "b", None)
    with pytest.raises(InputError, match="two outputs into"):
        check_output(tmp_path / "a", tmp_path / "." / "a")
    same = str(tmp_path / "a.svg")
    run("show", "nvidia-h200-tp2", "--plot", same, "--html", same, code=2)
    assert not list(tmp_path.iterdir())


def test_a_title_of_several_lines_is_pasted_as_it_is() -> None:
    section = Section("t", (Column("a", "a"),), [{"a": 1}], "# one\n# two")
    assert as_markdown([section]).startswith("```\n# one\n# two\n```\n\n| a |")
    assert as_markdown([Section("t", (Column("a", "a"),), [{"a": 1}], "one")]).startswith("### one")


def test_what_to_do_now_finds_the_profile_it_speaks_of() -> None:
    node = probe(2, device_type="cpu")
    made = profile_of({1: {"shm.one_shot": 5.0, GLOO: 8.0}}, node=node, baseline=GLOO)
    assert "`fusewise show`" in what_now(made, None)[0]
    other = made.model_copy(update={"dtype": "float16"})
    assert "`fusewise show --dtype float16`" in what_now(other, None)[0]
    three = made.fingerprint.model_copy(update={"world_size": 3})
    wide = made.model_copy(update={"fingerprint": three})
    assert "`fusewise show --tp 3`" in what_now(wide, None)[0]


@pytest.mark.usefixtures("own_home")
def test_a_profile_that_cannot_be_written_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    node = probe(2, device_type="cpu")
    made = profile_of({1: {"shm.one_shot": 5.0, GLOO: 8.0}}, node=node, baseline=GLOO)

    def full(*_: object) -> None:
        raise UnavailableError("cannot write it", got="No space left on device")

    monkeypatch.setattr(supervise, "tune_everywhere", lambda *_: made)
    monkeypatch.setattr(store, "extend", full)
    out, err = run("tune", code=3)
    assert "shm.one_shot" in out
    assert "cannot write it: got No space left on device" in err


@pytest.mark.usefixtures("own_home")
def test_where_no_profile_can_be_put_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "tune_everywhere", lambda *_: pytest.fail("it measured"))
    node = probe(2, device_type="cpu")
    target = store.user_dir() / profile_file_name(node, "bfloat16")
    private.why_not_private(target.parent, private.OTHERS_WRITE)
    target.symlink_to(target.parent / "elsewhere")
    assert "expected a regular file, got a symbolic link" in run("tune", code=3)[1]
    target.unlink()
    target.mkdir()
    assert "expected a regular file, got something else" in run("tune", code=3)[1]


@pytest.mark.usefixtures("own_home")
def test_a_folder_of_profiles_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    private.why_not_private(store.user_dir(), private.OTHERS_WRITE)
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.F_OK)
    notes = store.find_profile(probe(2, device_type="cpu"), "bfloat16").notes
    assert f"user profile passed over: {store.user_dir()} cannot be read" in notes


def test_what_has_no_path_left_says_so() -> None:
    out, _ = run(
        "explain",
        "4K",
        "-p",
        "nvidia-h200-tp2",
        "--without",
        "nccl,nccl_symm,flashinfer,symm_mem,custom",
    )
    assert "nvidia-h200-tp2 has no other path" in " ".join(out.split())
