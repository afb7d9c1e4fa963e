"""What ``tune`` says when it is done: what it did not reach, and what to do now. Mostly words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from fusewise.commands.options import INTERRUPTED
from fusewise.commands.output import check_picture
from fusewise.profiles.schema import Profile
from fusewise.ranks.place import default_ranks
from fusewise.shape import DType, Shape, format_size
from fusewise.tune.settings import Settings

_SHOWN = 8  # sizes named per hidden size


def unreached(event: dict[str, Any], settings: Settings) -> list[str]:
    """What the budget did not reach and how to go on; empty where all was measured.

    Args:
        event: of the tune: ``points`` as [op, num_tokens, hidden_size], and how many were
            ``planned``.
        settings: the tune's.
    """
    points = event["points"]
    if not points:
        return []
    sizes: dict[tuple[str, int], list[int]] = {}
    for op, num_tokens, hidden_size in points:
        size = Shape(num_tokens, hidden_size, settings.dtype).message_bytes
        sizes.setdefault((op, hidden_size), []).append(size)
    lines = [
        f"{settings.budget_s:g} s were not enough: {event['planned'] - len(points)} of "
        f"{event['planned']} points are measured. Not reached:"
    ]
    for (op, hidden_size), missing in sizes.items():
        shown = [format_size(size) for size in sorted(missing)]
        rest = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        lines.append(f"  {op} at hidden {hidden_size}: {', '.join(shown[:_SHOWN])}{rest}")
    lines.append("Run the same command again: it goes on with these.")
    return lines


def what_now(profile: Profile, into: Path | None) -> list[str]:
    """Three lines: look at it, give it to an engine, use it.

    Args:
        profile: what was measured.
        into: the folder it was kept in, where that is not the one that is searched.
    """
    named = f" --profile '{into / profile.file_name}'" if into else _asked_for(profile)
    look = f"`fusewise show{named}`, `fusewise report{named}`"
    engine = f"`fusewise audit{named}` says what its table costs here, `fusewise cap{named}` cures"
    if profile.fingerprint.device_type == "cpu":
        engine = "on GPUs `fusewise audit` says what its table costs (these are CPU ranks)"
    use = "fusewise.Communicator() and the engines' plugins find it by themselves"
    if into:
        use = "fusewise.Communicator(profile=FILE), or FUSEWISE_PROFILE=FILE"
    return [f"Look at it: {look}", f"An engine: {engine}", f"Use it: {use}"]


def _asked_for(profile: Profile) -> str:
    """The options by which this node's profile is found where they are not the defaults."""
    dtype = "" if profile.dtype == "bfloat16" else f" --dtype {profile.dtype}"
    ranks = profile.fingerprint.world_size
    return dtype + ("" if ranks == default_ranks() else f" --tp {ranks}")


@contextmanager
def kept_so_far(made: Sequence[Profile]) -> Iterator[None]:
    """An interruption after a profile was written does not claim that nothing was."""
    try:
        yield
    except KeyboardInterrupt:
        if not made:
            raise
        kept = ", ".join(profile.dtype for profile in made)
        typer.echo(f"fusewise: interrupted; what was measured of {kept} is kept", err=True)
        raise typer.Exit(INTERRUPTED) from None


def picture_of(plot: Path, dtype: DType, all_dtypes: Sequence[DType]) -> Path:
    """Where one dtype's picture goes: with several, each gets its own file.

    Raises:
        InputError: no picture has that suffix.
        UnavailableError: it cannot be written there.
    """
    file = plot if len(all_dtypes) == 1 else plot.with_stem(f"{plot.stem}-{dtype}")
    check_picture(file)
    return file
