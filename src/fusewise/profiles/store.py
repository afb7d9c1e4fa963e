"""Where profiles live, and which one applies.

Precedence, highest first: argument, command-line flag, environment, the user's profile, the
site's profile, a packaged published profile. Whatever comes after (the rule, an engine's default)
is not a profile and not decided here. An explicit profile that is broken is an error; one found by
searching that is broken or of other hardware is passed over with a note, and serving goes on.

What of a profile counts on a node is ``match.py``'s business; ``strict`` passes over a profile of
other versions.

Writing is atomic and exclusive: private directory, lock, temporary file, fsync, rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.abc import Traversable
from pathlib import Path
from typing import Literal

import platformdirs

from fusewise.errors import InputError, ProfileError, StaleProfileError, UnavailableError
from fusewise.node import HARDWARE, Fingerprint
from fusewise.profiles.match import as_it_counts, software_differences
from fusewise.profiles.schema import MAX_PROFILE_BYTES, Profile, parse_profile, profile_file_name
from fusewise.shape import DType

Level = Literal[
    "argument", "flag", "environment", "user profile", "site profile", "packaged profile",
    "rule", "engine default",
]  # fmt: skip

TUNE_HINT = "Run `fusewise tune` on this node."
_LOCK_TIMEOUT_S = 10.0


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
    base = Path(home) if home else Path(platformdirs.user_data_dir("fusewise", appauthor=False))
    return base / "profiles"


def site_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The site's profiles: ``$FUSEWISE_SITE_DIR`` or the platform's site directory."""
    site = environ.get("FUSEWISE_SITE_DIR")
    return Path(site) if site else Path(platformdirs.site_config_dir("fusewise")) / "profiles"


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


def find_profile(
    node: Fingerprint,
    dtype: DType,
    *,
    argument: str | os.PathLike[str] | Profile | None = None,
    flag: str | None = None,
    environ: Mapping[str, str] = os.environ,
    strict: bool | None = None,
) -> Resolution:
    """The profile that applies to a node, searched in order of precedence.

    Args:
        node: where it is to apply.
        dtype: of the messages.
        argument: a profile, or the name or path of one.
        flag: likewise, from a command line.
        environ: for FUSEWISE_PROFILE and FUSEWISE_STRICT, and where profiles are kept.
        strict: pass over what was measured with other versions; None: as FUSEWISE_STRICT says.

    Raises:
        InputError: FUSEWISE_STRICT is neither 0 nor 1.
        ProfileError: an explicitly named profile is missing or malformed.
        StaleProfileError: an explicitly named profile was measured on other hardware.
    """
    strict = _strict(environ) if strict is None else strict
    if isinstance(argument, Profile):
        return _explicit(argument, "argument", "the profile passed", node)
    named: list[tuple[Level, str | os.PathLike[str] | None]] = [
        ("argument", argument),
        ("flag", flag),
        ("environment", environ.get("FUSEWISE_PROFILE") or None),
    ]
    for level, name in named:
        if name is not None:
            return _explicit(load(name), level, os.fspath(name), node)
    return _search(node, dtype, environ, strict)


def _strict(environ: Mapping[str, str]) -> bool:
    text = environ.get("FUSEWISE_STRICT", "")
    if text not in ("", "0", "1"):
        raise InputError("FUSEWISE_STRICT", expected="0 or 1", got=repr(text))
    return text == "1"


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
        if os.path.lexists(path):
            try:
                yield level, str(path), parse_profile(_read(path), str(path))
            except ProfileError as error:
                notes.append(f"{level} passed over: {error}")
    for name in packaged_names():
        profile = load(name)
        if profile.dtype == dtype and not profile.fingerprint.differences(node, HARDWARE):
            yield "packaged profile", name, profile


def save(profile: Profile, folder: Path | None = None) -> Path:
    """Writes a profile under its own name; the old one becomes ``.previous`` beside it.

    Raises:
        UnavailableError: the directory is not ours, the target is a symlink, or another writer
            held the lock for ten seconds.
    """
    folder = folder or user_dir()
    private_directory(folder)
    target = folder / profile.file_name
    with _locked(folder):
        if target.is_symlink():
            raise UnavailableError(
                f"{target} is a symbolic link", hint="Remove it; profiles are regular files."
            )
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(profile.to_json())
                file.flush()
                os.fsync(file.fileno())
            _keep_previous(target)
            Path(temporary).replace(target)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise UnavailableError(f"cannot write {target}", got=str(error)) from error
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return target


def _keep_previous(target: Path) -> None:
    """A second name for the profile that is about to be replaced: a narrow tune loses nothing."""
    if target.exists():
        kept = target.with_suffix(".previous")
        kept.unlink(missing_ok=True)
        os.link(target, kept)


def private_directory(folder: Path) -> None:
    """Makes sure that ``folder`` exists, is ours and that nobody else can write there.

    Raises:
        UnavailableError: it is not, or cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise UnavailableError(
            f"cannot keep profiles in {folder}",
            got=str(error),
            hint="Choose another with --output or FUSEWISE_HOME.",
        ) from error
    if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnavailableError(
            f"{folder} is not private",
            expected="a directory of yours that nobody else can write",
            got=f"owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}",
            hint="Choose a directory of your own with --output or FUSEWISE_HOME.",
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"another process has held the lock of {folder} for {_LOCK_TIMEOUT_S:g} s",
                        hint="Wait for the other tune to end, then run this again.",
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "a symbolic link" if path.is_symlink() else error.strerror
        known = ", ".join(packaged_names())
        raise ProfileError(
            f"cannot read profile {path}", got=reason, hint=f"Packaged profiles: {known}."
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
