"""Which release's tables answer for a version: its own, or the newest for a newer one. Pure.

An engine's ``tables.py`` holds one entry per release that was read; this finds the one to use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from fusewise.errors import InputError

T = TypeVar("T")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)+)(?:[.+-]?[a-z].*|\+.*)?")


@dataclass(frozen=True)
class Releases(Generic[T]):
    """The tables of an engine's releases.

    Args:
        engine: as its users call it.
        numbers: how many numbers of a version name a release; a version has so many or one more.
        tables: by release, oldest first.
    """

    engine: str
    numbers: int
    tables: Mapping[str, T]

    def tables_of(self, version: str) -> T:
        """The tables of a release.

        Raises:
            InputError: no wheel of that release was read; names those that were.
        """
        release = self._release(version) or version.strip()
        if release in self.tables:
            return self.tables[release]
        mine = _rank(release)
        near = min(self.tables, key=lambda one: abs(_rank(one) - mine)) if mine else None
        raise InputError(
            f"unknown {self.engine} version",
            expected=f"one of {', '.join(self.tables)}",
            got=repr(version),
            hint=f"The nearest known one is {near}." if near else None,
        )

    def known_version(self, version: str) -> tuple[str, str | None]:
        """The version whose tables stand for this one, and what to say where it is another.

        A release newer than all that were read is taken for the newest of those: its tables are
        compared with the live ones, and its seams looked for, before anything is set.

        Raises:
            InputError: no release, or an older one that was not read.
        """
        release, newest = self._release(version), list(self.tables)[-1]
        if release and _rank(release) > _rank(newest):
            said = f"{self.engine} {version} was not read; the tables of {newest} stand for it"
            return newest, said
        self.tables_of(version)
        return version, None

    def _release(self, version: str) -> str | None:
        match = _VERSION.fullmatch(version.strip())
        parts = match[1].split(".") if match else []
        return ".".join(parts[: self.numbers]) if 0 <= len(parts) - self.numbers <= 1 else None


def _rank(release: str) -> int:
    """For order and distance: ``0.33`` → 330000, ``0.5.22`` → 50022; 0 where it holds no number."""
    major, minor, patch, *_ = [*map(int, re.findall(r"\d+", release)), 0, 0, 0]
    return (10_000 * major + minor) * 10_000 + patch
