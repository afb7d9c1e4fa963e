"""How profiles are written, and what was there before: nothing measured is ever lost.

A profile that is about to be replaced gets a second name under ``history/`` first. Writing is
atomic and exclusive. Decides nothing about which profile applies.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path

from fusewise.errors import UnavailableError
from fusewise.profiles import private
from fusewise.profiles.schema import Profile

KEPT = 50  # per profile; a full one is near 300 KB
_LOCK_TIMEOUT_S = 10.0
_STAMP = "%Y-%m-%dT%H-%M-%SZ"


def private_directory(folder: Path) -> None:
    """Makes sure that ``folder`` exists, is ours, and that we can write there and nobody else.

    Raises:
        UnavailableError: it is not, or cannot be made.
    """
    reason = private.why_not_private(folder, private.OTHERS_WRITE)
    if reason is None and not os.access(folder, os.W_OK | os.X_OK):
        reason = "cannot be written"
    if reason is not None:
        raise UnavailableError(
            f"cannot keep profiles in {folder}",
            expected="a directory of yours that nobody else can write",
            got=f"one that {reason}",
            hint="Choose another with --into or FUSEWISE_HOME.",
        )


def turn(folder: Path) -> AbstractContextManager[None]:
    """Only one writer at a time in this folder.

    Raises:
        UnavailableError: another one held it for ten seconds.
    """
    return private.lock_of(folder, _LOCK_TIMEOUT_S)


def replace(profile: Profile, folder: Path) -> Path:
    """Writes a profile; what was there goes to the history. Takes a turn; see ``put``."""
    private_directory(folder)
    with turn(folder):
        return put(profile, folder)


def put(profile: Profile, folder: Path) -> Path:
    """As ``replace``, for a caller who has the turn.

    Raises:
        UnavailableError: the target is a symlink, or cannot be written; the old one stays.
    """
    target = folder / profile.file_name
    check_target(target)
    try:
        if target.exists():
            _keep(target)
        private.write_whole(target, profile.to_json().encode())
    except OSError as error:
        raise UnavailableError(f"cannot write {target}", got=str(error)) from error
    return target


def check_target(target: Path) -> None:
    """Whether a profile can be put there, and what is there into the history.

    Raises:
        UnavailableError: it is no regular file, or its history cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_file()):
        got = "a symbolic link" if target.is_symlink() else "something else"
        raise UnavailableError(
            f"{target} is no profile", expected="a regular file", got=got, hint="Remove it."
        )
    there = folder_of(target)
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise UnavailableError(f"cannot keep the earlier profile: {there} cannot be written")


def folder_of(target: Path) -> Path:
    """Where the earlier profiles of one name are."""
    return target.parent / "history" / target.stem


def earlier(target: Path) -> list[Path]:
    """The earlier profiles of one name, the newest first."""
    return sorted(folder_of(target).glob("*.json"), key=_order, reverse=True)


def restore(target: Path, kept: Path) -> None:
    """Puts an earlier profile back; the present one goes to the history.

    Raises:
        UnavailableError: it cannot be read or written; the present one stays.
    """
    with turn(target.parent):
        try:
            content = kept.read_bytes()
            if target.exists():
                _keep(target)
            private.write_whole(target, content)
        except OSError as error:
            raise UnavailableError(f"cannot restore {kept.name}", got=str(error)) from error


def _keep(target: Path) -> None:
    """A second name for what is about to be replaced, after the time it was written."""
    folder = folder_of(target)
    reason = private.why_not_private(folder, private.OTHERS_WRITE)
    if reason is not None:
        raise UnavailableError(f"cannot keep the earlier profile: {folder} {reason}")
    written = datetime.fromtimestamp(target.stat().st_mtime, timezone.utc).strftime(_STAMP)
    taken = [_order(path)[1] for path in folder.glob(f"{written}*.json")]
    kept = folder / (f"{written}_{max(taken) + 1}.json" if taken else f"{written}.json")
    try:
        os.link(target, kept)
    except OSError:  # a file system without hard links
        shutil.copy2(target, kept)
    for old in earlier(target)[KEPT:]:
        old.unlink(missing_ok=True)


def _order(path: Path) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", path.stem)
    assert match is not None  # the pattern takes everything
    return match[1], int(match[2] or 1)
