"""``python -m fusewise`` and the ``fusewise`` script: the command line, imported under guard."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import Any


class _Forgiving:
    """stderr whose reader may go away, or whose disk fill: what is said there is lost, no more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main() -> None:
    """Runs the command line; an interruption while it is still being imported is one too."""
    # Where stderr is closed, the first file opened takes its place; better this one than a lock's.
    sys.stderr = _Forgiving(sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        gc.disable()  # modules are not garbage; collecting among them is a tenth of the start
        from fusewise.commands.app import app

        gc.enable()
        app(prog_name="fusewise")  # also as `python -m fusewise`, for help and completion
    except KeyboardInterrupt:
        print("fusewise: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # of --help or --version; a command's own are said in its border
        print(f"fusewise: error: {error}", file=sys.stderr)
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()
