"""``python -m fusewise`` and the ``fusewise`` script: the command line, imported under guard."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Runs the command line; an interruption while it is still being imported is one too."""
    try:
        gc.disable()  # modules are not garbage; collecting among them is a tenth of the start
        from fusewise.commands.app import app

        gc.enable()
        app(prog_name="fusewise")  # also as `python -m fusewise`, for help and completion
    except KeyboardInterrupt:
        print("fusewise: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
