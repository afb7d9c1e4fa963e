"""Folders and files that only this user can write: how profiles and compiled kernels are kept.

One reader of a file sees the old content or the whole new one, and two writers take turns. Knows
nothing of what is written.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusewise.errors import UnavailableError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_ENTER = stat.S_IRWXG | stat.S_IRWXO
_PRIVATE = 0o700


def why_not_private(folder: Path, forbidden: int, *, follow: bool = True) -> str | None:
    """Makes the folder if it is absent; why it is not ours alone, or None.

    Args:
        folder: to be created with mode 0700.
        forbidden: permission bits that must not be set.
        follow: whether it may be a symbolic link to such a folder.
    """
    try:
        folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        found = folder.stat() if follow else folder.lstat()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return "is a symbolic link"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & forbidden:
        return f"has mode {stat.S_IMODE(found.st_mode):o}, not {_PRIVATE:o}"
    return None


def open_to_others(folder: Path) -> str | None:
    """How others may write there, in words; None if they may not, or it is absent."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return None
    return (
        f"has mode {stat.S_IMODE(mode):o}: others may write there" if mode & OTHERS_WRITE else None
    )


def write_whole(target: Path, content: bytes) -> None:
    """Replaces ``target`` at once: temporary file beside it, fsync, rename. Mode 0600.

    Raises:
        OSError: the old content, if any, is still there and nothing else is.
    """
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def lock_of(folder: Path, timeout_s: float) -> Iterator[None]:
    """Only one process at a time is inside; the lock goes when its holder ends, however.

    Raises:
        UnavailableError: another process held it for ``timeout_s``.
    """
    with try_lock(folder / ".lock", timeout_s) as free:
        if not free:
            raise UnavailableError(
                f"another process has held the lock of {folder} for {timeout_s:g} s",
                hint="Wait for it to end, then run this again.",
            )
        yield


@contextmanager
def try_lock(file: Path, timeout_s: float) -> Iterator[bool]:
    """Whether this process got the lock within ``timeout_s``; if so, it keeps it inside.

    Other users may take the same lock: what it guards is not the file.

    Raises:
        OSError: the file cannot be opened.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=timeout_s, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
