"""Where profiles live, and which one applies.

Precedence, highest first: argument, command-line flag, environment, the user's profile, the
site's profile, a packaged published profile. Whatever comes after (the rule, an engine's default)
is not a profile and not decided here. An explicit profile that is broken is an error; one found by
searching that is broken or of other hardware is passed over with a note, and serving goes on.

What of a profile counts on a node is ``match.py``'s business; ``strict`` passes over a profile of
other versions.

How they are written, and what becomes of the one that was there, is ``history.py``'s.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import platformdirs

from fusewise.errors import ProfileError, StaleProfileError
from fusewise.node import HARDWARE, Fingerprint
from fusewise.profiles import history
from fusewise.profiles.match import as_it_counts, software_differences
from fusewise.profiles.merge import differences, extended
from fusewise.profiles.private import open_to_others
from fusewise.profiles.schema import MAX_PROFILE_BYTES, Profile, parse_profile, profile_file_name
from fusewise.profiles.variables import path_of, switched_on
from fusewise.shape import DType

if TYPE_CHECKING:
    from importlib.abc import Traversable  # gone in 3.14; its heir is not there in 3.10

Level = Literal[
    "argument", "flag", "environment", "user profile", "site profile", "packaged profile",
    "rule", "engine default",
]  # fmt: skip

NAMED: tuple[Level, ...] = ("argument", "flag", "environment")  # of whatever node it is

TUNE_HINT = "Run `fusewise tune` on this node."


@dataclass(frozen=True)
class Resolution:
    """Which profile answered, from which level, and what was passed over on the way."""

    profile: Profile | None
    level: Level
    where: str
    notes: tuple[str, ...] = ()


def user_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The user's profiles: ``$FUSEWISE_HOME/profiles`` or the platform's data directory."""
    home = environ.get("FUSEWISE_HOME")
    base = path_of(home) if home else Path(platformdirs.user_data_dir("fusewise", appauthor=False))
    return base / "profiles"


def site_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The site's profiles: ``$FUSEWISE_SITE_DIR`` or the platform's site directory."""
    site = environ.get("FUSEWISE_SITE_DIR")
    return path_of(site) if site else Path(platformdirs.site_config_dir("fusewise")) / "profiles"


def packaged_names() -> list[str]:
    """Names of the published profiles that come with the package."""
    return sorted(f.name.removesuffix(".json") for f in _packaged().iterdir())


def _packaged() -> Traversable:
    return resources.files("fusewise").joinpath("profiles", "data")


def load(name_or_path: str | os.PathLike[str]) -> Profile:
    """A profile by file path, or by the name of a packaged one.

    Raises:
        ProfileError: there is none, it is no regular file, or its content is malformed.
    """
    name = os.fspath(name_or_path)
    if name in packaged_names():
        text = _packaged().joinpath(f"{name}.json").read_text("utf-8")
        return parse_profile(text, f"packaged profile {name}")
    return parse_profile(_read(Path(name)), name)


def load_variable(name: str) -> Profile:
    """The profile that FUSEWISE_PROFILE names.

    Raises:
        ProfileError: as ``load``, and the message names the variable.
    """
    try:
        return load(path_of(name))
    except ProfileError as error:
        raise error.about("FUSEWISE_PROFILE") from error


def find_profile(
    node: Fingerprint,
    dtype: DType,
    *,
    argument: str | os.PathLike[str] | Profile | None = None,
    environ: Mapping[str, str] = os.environ,
    strict: bool | None = None,
) -> Resolution:
    """The profile that applies to a node, searched in order of precedence.

    Args:
        node: where it is to apply.
        dtype: of the messages.
        argument: a profile, or the name or path of one.
        environ: for FUSEWISE_PROFILE and FUSEWISE_STRICT, and where profiles are kept.
        strict: pass over what was measured with other versions; None: as FUSEWISE_STRICT says.

    Raises:
        InputError: FUSEWISE_STRICT is neither 0 nor 1.
        ProfileError: an explicitly named profile is missing or malformed.
        StaleProfileError: an explicitly named profile was measured on other hardware.
    """
    strict = switched_on("FUSEWISE_STRICT", environ) if strict is None else strict
    if isinstance(argument, Profile):
        return _explicit(argument, "argument", "the profile passed", node)
    if argument is not None:
        return _explicit(load(argument), "argument", os.fspath(argument), node)
    variable = environ.get("FUSEWISE_PROFILE")
    if variable:
        return _explicit(load_variable(variable), "environment", variable, node)
    return _search(node, dtype, environ, strict)


def _explicit(profile: Profile, level: Level, where: str, node: Fingerprint) -> Resolution:
    other = profile.fingerprint.differences(node, HARDWARE)
    if other:
        raise StaleProfileError(
            f"{where} was measured on another node", got="; ".join(other), hint=TUNE_HINT
        )
    kept, notes = as_it_counts(profile, node, where)
    return Resolution(kept, level, where, tuple(notes))


def _search(
    node: Fingerprint, dtype: DType, environ: Mapping[str, str], strict: bool
) -> Resolution:
    notes: list[str] = []
    for level, name, profile in _candidates(node, dtype, environ, notes):
        stale = software_differences(profile, node) if strict else []
        stale += profile.fingerprint.differences(node, HARDWARE)
        if stale:
            notes.append(f"{level} {Path(name).name} is stale: {'; '.join(stale)}. {TUNE_HINT}")
            continue
        kept, differing = as_it_counts(profile, node, name)
        notes += differing
        if kept is not None:
            return Resolution(kept, level, name, tuple(notes))
    return Resolution(None, "engine default", f"no {dtype} profile for this node", tuple(notes))


def _candidates(
    node: Fingerprint, dtype: DType, environ: Mapping[str, str], notes: list[str]
) -> Iterator[tuple[Level, str, Profile]]:
    folders: list[tuple[Level, Path]] = [
        ("user profile", user_dir(environ)),
        ("site profile", site_dir(environ)),
    ]
    for level, folder in folders:
        path = folder / profile_file_name(node, dtype)
        if os.access(folder, os.F_OK) and not os.access(folder, os.R_OK | os.X_OK):
            notes.append(f"{level} passed over: {folder} cannot be read")
        elif os.path.lexists(path):
            # What searching finds decides what an engine runs, and nobody asked for it by name.
            if level == "user profile" and (reason := open_to_others(folder)):
                notes.append(f"{level} passed over: {folder} {reason}. Run: chmod go-w {folder}")
                continue
            try:
                yield level, str(path), parse_profile(_read(path), str(path))
            except ProfileError as error:
                notes.append(f"{level} passed over: {error}")
    for name in packaged_names():
        profile = load(name)
        if profile.dtype == dtype and not profile.fingerprint.differences(node, HARDWARE):
            yield "packaged profile", name, profile


def save(profile: Profile, folder: Path | None = None) -> Path:
    """Writes a profile in place of the one of its name, which goes to the history.

    Raises:
        UnavailableError: the directory is not ours, the target is a symlink, the disk is full, or
            another writer held the lock for ten seconds.
    """
    return history.replace(profile, folder or user_dir())


def extend(profile: Profile, folder: Path | None = None) -> tuple[Path, Profile]:
    """Adds what was measured to the profile of the same node, versions and dtype; see ``save``.

    Returns:
        Where it is, and all that it now holds. Without such a profile, or with one that is broken
        or of other versions (which goes to the history), that is the new one alone.
    """
    where = folder or user_dir()
    history.private_directory(where)
    with history.turn(where):
        known = kept_in(where, profile.fingerprint, profile.dtype)
        if known is not None and not differences(known, profile):
            profile = extended(known, profile)
        return history.put(profile, where), profile


def kept_in(folder: Path, node: Fingerprint, dtype: DType) -> Profile | None:
    """The profile kept under this node's name, current or not; None without a readable one."""
    path = folder / profile_file_name(node, dtype)
    try:
        return parse_profile(_read(path), str(path))
    except ProfileError:
        return None


def _read(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise ProfileError(
                f"cannot read profile {path}", expected="a regular file", got="a symbolic link"
            ) from error
        known = ", ".join(packaged_names())
        raise ProfileError(
            f"cannot read profile {path}", got=error.strerror, hint=f"Packaged profiles: {known}."
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ProfileError(f"{path} is no regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(MAX_PROFILE_BYTES + 1)
    finally:
        os.close(handle)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not valid UTF-8", got=str(error)) from error
