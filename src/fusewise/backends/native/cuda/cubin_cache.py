"""Compiled kernels kept on disk between processes, in a directory only this user can write.

A cubin is code that will run on the GPU, so a file is used only if nobody else can have written it
and its digest is right. Anything else counts as absent and is compiled again. Never compiles.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from pathlib import Path

import platformdirs

from fusewise.profiles.private import (
    OTHERS_ENTER,
    OTHERS_WRITE,
    why_not_private,
    write_whole,
)
from fusewise.profiles.variables import path_of

_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_CUBIN_BYTES = 64 * 2**20  # ours are near 20 KB


class CubinCache:
    """Cubins by key: each file is the SHA-256 of the cubin, then the cubin.

    Args:
        folder: where; None for ``FUSEWISE_CACHE_DIR`` or the user's cache directory. Created with
            mode 0700 if absent. A folder that others may write, that belongs to somebody else or
            that is a symbolic link is not used at all, with a warning.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        self._usable: bool | None = None

    def get(self, key: str) -> bytes | None:
        """The cubin stored under ``key``; None if there is none that can be trusted."""
        if not self._ready():
            return None
        try:
            handle = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # absent, a symbolic link, or not readable: compile it
            return None
        with os.fdopen(handle, "rb") as file:
            if not _is_private_file(os.fstat(handle)):
                return None
            content = file.read(_MAX_CUBIN_BYTES)
        digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return cubin if hashlib.sha256(cubin).digest() == digest else None

    def put(self, key: str, cubin: bytes) -> None:
        """Stores a cubin; readers see the old file or the whole new one."""
        if not self._ready():
            return
        try:
            write_whole(self._path(key), hashlib.sha256(cubin).digest() + cubin)
        except OSError as error:  # a full disk costs a compilation next time, nothing else
            warnings.warn(f"compiled kernel not cached: {error}", RuntimeWarning, stacklevel=2)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.cubin"

    def _ready(self) -> bool:
        if self._usable is None:
            reason = why_not_private(self.folder, OTHERS_ENTER, follow=False)
            self._usable = reason is None
            if reason:
                warnings.warn(
                    f"kernels are compiled in every process: {self.folder} {reason}. "
                    "Set FUSEWISE_CACHE_DIR to a directory of your own.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return self._usable


def default_folder() -> Path:
    """``$FUSEWISE_CACHE_DIR/cubins``, or ``fusewise/cubins`` in the user's cache directory."""
    root = os.environ.get("FUSEWISE_CACHE_DIR") or platformdirs.user_cache_dir("fusewise")
    return path_of(root) / "cubins"


def _is_private_file(found: os.stat_result) -> bool:
    """Ours alone: a regular file of this user that nobody else may write."""
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.getuid()
        and not (found.st_mode & OTHERS_WRITE)
    )
