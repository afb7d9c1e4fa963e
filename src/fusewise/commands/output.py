"""What commands write: data to stdout, words to stderr, texts into files, whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fusewise.errors import InputError, UnavailableError
from fusewise.profiles import private
from fusewise.report.table import Format, Section
from fusewise.report.text import render_sections


def check_stdout() -> None:
    """Whether data can be written: asked before anything is measured.

    Raises:
        UnavailableError: stdout is closed.
    """
    if sys.stdout is None:
        raise UnavailableError("stdout is closed", hint="Redirect it to a file or a pipe.")


def write(sections: Sequence[Section], fmt: Format, main: str | None = None) -> None:
    """Data to stdout.

    ``main``: the name of the one table that CSV holds; by default the first.
    """
    check_stdout()
    write_text(render_sections(sections, fmt, main=main))


def write_text(text: str) -> None:
    """A text to stdout. A reader that goes away, such as ``| head``, changes no verdict.

    Raises:
        UnavailableError: stdout is closed.
    """
    check_stdout()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without µ still gets its table
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # what is still buffered must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(notes: Sequence[str]) -> None:
    """Notes to stderr."""
    for note in notes:
        typer.echo(f"fusewise: {note}", err=True)


def write_file(file: Path, text: str) -> None:
    """A text into the user's file, which has its old content or the whole new one. What cannot be
    replaced is written in place: a pipe, a device, another user's file, a mounted one.

    Raises:
        UnavailableError: it cannot be written.
    """
    target = Path(os.path.realpath(file))  # what a link stands for
    try:
        if not _replaced(target, text.encode()):
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnavailableError(f"cannot write {file}", got=error.strerror or str(error)) from error
    tell([f"wrote {file}"])


def _replaced(target: Path, content: bytes) -> bool:
    try:
        found = target.stat() if target.exists() else None
        if found and not (stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()):
            return False
        private.write_whole(target, content)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EBUSY):
            return False
        raise
    target.chmod(stat.S_IMODE(found.st_mode) if found else 0o666 & ~_umask())
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_picture(profile: Any, plan: Any, file: Path) -> None:
    """The profile's picture."""
    from fusewise.report.plot import save

    save(profile, plan, file)
    tell([f"wrote {file}"])


def check_output(*files: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Whether files can be written there, each its own: asked before anything is measured.

    Raises:
        InputError: another suffix, or two are the same.
        UnavailableError: nothing can be written there, or there is no such directory.
    """
    named = [file for file in files if file is not None]
    if len({os.path.realpath(file) for file in named}) < len(named):
        raise InputError(f"two outputs into {named[0]}", hint="Name a file for each.")
    for file in named:
        if suffixes and file.suffix.lower() not in suffixes:
            raise InputError(
                "unknown picture format", expected=" or ".join(suffixes), got=f"{file}"
            )
        if not file.parent.is_dir():
            raise UnavailableError(
                f"cannot write {file}", got="a directory that does not exist", hint="Make it first."
            )
        if file.is_dir():
            raise UnavailableError(f"cannot write {file}", expected="a file", got="a directory")
        target = Path(os.path.realpath(file))
        try:
            if file.exists():
                os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
            else:
                target.open("xb").close()
                target.unlink()
        except OSError as error:
            got = error.strerror or str(error)
            raise UnavailableError(f"cannot write {file}", got=got) from error


def check_picture(file: Path | None) -> None:
    """Whether a picture can be written there; see ``check_output``.

    Raises:
        UnavailableError: a .png without matplotlib.
    """
    check_output(file, suffixes=(".svg", ".png"))
    if file is not None and file.suffix.lower() == ".png":
        from fusewise.report.drawing import check_matplotlib

        check_matplotlib("a .png")
