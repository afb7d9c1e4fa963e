"""What environment variables hold: a path, a switch. Reads none of its own accord."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fusewise.errors import InputError


def path_of(text: str) -> Path:
    """A path as a variable has it, with a leading ``~``: no shell expands it in every place."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody of that name: a folder that is called so
        return Path(text)


def switched_on(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a variable that is 0, 1 or absent is 1.

    Raises:
        InputError: it is something else.
    """
    text = environ.get(name, "")
    if text not in ("", "0", "1"):
        raise InputError(name, expected="0 or 1", got=repr(text))
    return text == "1"
