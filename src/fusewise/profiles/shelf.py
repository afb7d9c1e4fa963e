"""Every profile there is on this machine, and what people may call one. Writes nothing.

A reference is a file, a name or a part of one that fits a single profile, or a name with ``@`` and
the beginning of a date: that profile as it was before it was replaced. ``@`` alone is the newest
such one of this node's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusewise.errors import ProfileError
from fusewise.profiles import history, store
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import Level


@dataclass(frozen=True)
class Kept:
    """One profile, read or not. ``file`` None: it comes with the package."""

    level: Level
    name: str
    file: Path | None

    def load(self) -> Profile:
        """Its content.

        Raises:
            ProfileError: it is broken.
        """
        return store.load(self.name if self.file is None else self.file)

    def earlier(self) -> list[Path]:
        """What it replaced, the newest first."""
        return [] if self.file is None else history.earlier(self.file)


def shelf(environ: Mapping[str, str] = os.environ) -> list[Kept]:
    """All of them: the user's, the site's, the packaged, each by name."""
    folders: list[tuple[Level, Path]] = [
        ("user profile", store.user_dir(environ)),
        ("site profile", store.site_dir(environ)),
    ]
    found = [
        Kept(level, file.stem, file)
        for level, folder in folders
        for file in sorted(folder.glob("*.json"))
    ]
    return found + [Kept("packaged profile", name, None) for name in store.packaged_names()]


def kept(name: str, environ: Mapping[str, str] = os.environ) -> Kept:
    """The profile of that name, or the only one whose name holds it; the user's before others'.

    Raises:
        ProfileError: none, or several; names them.
    """
    there = shelf(environ)
    exact = [one for one in there if one.name == name]
    parts = {one.name: one for one in reversed(there) if name in one.name}
    if exact or len(parts) == 1:
        return exact[0] if exact else next(iter(parts.values()))
    raise ProfileError(
        f"no profile {name!r}" if not parts else f"{name!r} is a part of several names",
        expected="a file, or one of " + ", ".join(sorted(parts or {one.name for one in there})),
        hint="`fusewise profile list` shows them.",
    )


def before(one: Kept, date: str) -> list[Path]:
    """The earlier versions of a profile whose date begins with ``date``, the newest first.

    Raises:
        ProfileError: there is none; names those there are.
    """
    dates = one.earlier()
    found = [file for file in dates if file.stem.startswith(date)]
    if not found:
        known = ", ".join(file.stem for file in dates) or "none"
        raise ProfileError(f"{one.name} has no earlier version {date}".rstrip(), got=known)
    return found


def named(reference: str, own: str, environ: Mapping[str, str] = os.environ) -> Profile:
    """What a reference stands for.

    Args:
        reference: see above.
        own: the name of this node's profile, which an empty name stands for.
        environ: where profiles are kept.

    Raises:
        ProfileError: nothing of that name, or it is broken.
    """
    if Path(reference).exists() or "@" not in reference:
        return (
            store.load(reference) if Path(reference).exists() else kept(reference, environ).load()
        )
    name, _, date = reference.rpartition("@")
    return store.load(before(kept(name or own, environ), date)[0])
