"""What several commands share: option types, parsing, the error border."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, TypeVar

import typer

from fusewise.commands.output import tell
from fusewise.errors import FusewiseError, InputError, ProfileError, UnavailableError
from fusewise.node import Fingerprint, Kind, gpu_count, probe
from fusewise.profiles import shelf, store
from fusewise.profiles.schema import Profile, profile_file_name
from fusewise.ranks.place import default_ranks
from fusewise.report.table import Format
from fusewise.shape import DType, parse_dtype

Command = TypeVar("Command", bound=Callable[..., Any])

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

FormatOption = Annotated[
    Format, typer.Option("--format", "-f", help="Form of the data on stdout.", show_default=True)
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile", "-p", help="A profile's file, or a packaged one's name (nvidia-h200-tp8)."
    ),
]
DTypeOption = Annotated[
    str | None,
    typer.Option("--dtype", "-d", help="bf16, fp16 or fp32. Default: the profile's, else bf16."),
]
HiddenOption = Annotated[
    str | None, typer.Option("--hidden", help="Hidden sizes, such as 2048,4096,7168.")
]
TpOption = Annotated[
    int | None,
    typer.Option(
        "--tp", min=1, max=4096, help="Ranks of one group. Default: one per GPU, or 2 on CPUs."
    ),
]
StrictOption = Annotated[
    bool | None,
    typer.Option("--strict", help="Pass over profiles of other versions; as FUSEWISE_STRICT=1."),
]
WithoutOption = Annotated[
    list[str] | None,
    typer.Option("--without", help="Leave out a backend or a provider; may be repeated."),
]


def bordered(command: Command) -> Command:
    """Turns our errors and torch's absence into one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except FusewiseError as error:
            typer.echo(f"fusewise: error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("fusewise: interrupted; nothing was written", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except ImportError as error:
            if not (error.name or "").startswith("torch"):
                raise
            hint = "Run `pip install torch`; `fusewise doctor` says what else is missing."
            typer.echo(f"fusewise: error: torch cannot be imported ({error}). {hint}", err=True)
            raise typer.Exit(UnavailableError.exit_code) from None
        except OSError as error:  # a file or stream of the user's: named by the error itself
            typer.echo(f"fusewise: error: {error}", err=True)
            raise typer.Exit(UnavailableError.exit_code) from None

    return run  # type: ignore[return-value]


def integers(text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """``"2048,4096"`` → ``(2048, 4096)``.

    Raises:
        InputError: something between the commas is no positive whole number.
    """
    if text is None:
        return tuple(default)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise InputError(
            "not a list of sizes",
            expected="numbers from 1 to 999999999, such as 2048,4096",
            got=repr(text[:80]),
        )
    return tuple(int(part) for part in parts)


def seconds(text: str) -> float:
    """``"90s"``, ``"1.5m"``, ``"2h"`` or plain seconds.

    Raises:
        InputError: not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)?", text.strip())
    if match is None:
        raise InputError("not a duration", expected="a form such as 90s or 2m", got=repr(text))
    return float(match[1]) * {"m": 60, "min": 60, "h": 3600}.get(match[2] or "s", 1)


def words(items: Sequence[str] | None) -> tuple[str, ...]:
    """``["a,b", "c"]`` → ``("a", "b", "c")``: repeated options and commas mean the same."""
    return tuple(w.strip() for item in items or () for w in item.split(",") if w.strip())


def check_made_for(kind: Kind, chosen: Collection[str]) -> None:
    """Whether any of the backends chosen, if there are some, runs where these ranks do.

    Raises:
        InputError: none does.
    """
    from fusewise.backends.registry import ids_for

    here = ids_for(kind)
    if chosen and not set(chosen) & set(here):
        raise InputError(
            "no such backend where these ranks run",
            expected=", ".join(here),
            got=", ".join(sorted(chosen)),
        )


def this_node(tp: int | None) -> Fingerprint:
    """The fingerprint of a group of ``tp`` ranks on this host."""
    return probe(tp or default_ranks(), device_type=None if gpu_count() else "cpu")


def resolve(
    profile: str | None, dtype: str | None, tp: int | None, strict: bool | None = None
) -> store.Resolution:
    """The profile to read: the one named, whatever node it is from, else this node's own.

    Raises:
        InputError: an unknown dtype, or the named profile is of another dtype or number of ranks.
        ProfileError: the named profile is missing or malformed.
    """
    asked = None if dtype is None else parse_dtype(dtype)
    named = profile if profile is not None else os.environ.get("FUSEWISE_PROFILE")
    if not named:
        return store.find_profile(this_node(tp), asked or "bfloat16", strict=strict)
    found = store.load(named) if profile is not None else store.load_variable(named)
    check_asked(found, named, dtype, tp)
    return store.Resolution(found, "environment" if profile is None else "flag", named)


def check_asked(found: Profile, named: str, dtype: str | None, tp: int | None) -> None:
    """Whether a profile that was named is what the options say.

    Raises:
        InputError: it is of another dtype or number of ranks.
    """
    ranks = found.fingerprint.world_size
    if tp not in (None, ranks):
        raise InputError(f"{named} is of {ranks} ranks", got=f"--tp {tp}")
    if dtype is not None and parse_dtype(dtype) != found.dtype:
        raise InputError(f"{named} is of {found.dtype}", got=f"--dtype {dtype}")


def dtype_of(dtype: str | None, profile: Profile | None) -> DType:
    """The dtype asked for, else the profile's, else bfloat16."""
    if dtype is not None:
        return parse_dtype(dtype)
    return "bfloat16" if profile is None else profile.dtype


def resolve_or_fail(
    profile: str | None, dtype: str | None, tp: int | None, strict: bool | None = None
) -> store.Resolution:
    """Like ``resolve``; an error where no profile applies."""
    found = resolve(profile, dtype, tp, strict)
    tell(found.notes)
    if found.profile is None:
        names = ", ".join(dict.fromkeys(one.name for one in shelf.shelf()))
        raise ProfileError(
            found.where,
            hint=f"Run `fusewise tune`, or choose with --dtype, --tp or --profile: {names}.",
        )
    return found


def named_profile(reference: str | None, dtype: str | None, tp: int | None) -> Profile:
    """The profile of a reference (see ``profiles.shelf``), or the one that this node runs by.

    Raises:
        ProfileError: nothing of that name, or it is broken.
    """
    if reference is None:
        found = resolve_or_fail(None, dtype, tp).profile
        assert found is not None
        return found
    return shelf.named(reference, own_name(dtype, tp) if reference.startswith("@") else "")


def own_name(dtype: str | None, tp: int | None) -> str:
    """The name of this node's profile.

    Raises:
        ProfileError: it has none.
    """
    file = store.user_dir() / profile_file_name(this_node(tp), dtype_of(dtype, None))
    if not file.exists():
        raise ProfileError(
            f"this node has no profile {file.stem}",
            hint="Run `fusewise tune`; `fusewise profile list` shows what there is.",
        )
    return file.stem


def dtypes(text: str) -> tuple[DType, ...]:
    """``"bf16,fp16"`` → dtypes, each once."""
    return tuple(dict.fromkeys(parse_dtype(part) for part in text.split(",")))
