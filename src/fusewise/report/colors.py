"""Every colour of the pictures and of the page, by name, on light and on dark ground. Data only.

A backend keeps its colour and marker in every picture; a path's colour is its backend's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fusewise.operation import backend_of

# Paul Tol's "muted" scheme, made for colour-blind readers (personal.sron.nl/~pault), and a grey;
# the second of each is the same hue, light enough for dark ground.
STYLES: Mapping[str, tuple[str, str, str]] = {
    "native.one_shot": ("#332288", "#9d92f0", "o"),
    "native.two_shot": ("#88CCEE", "#88CCEE", "s"),
    "shm.one_shot": ("#332288", "#9d92f0", "o"),
    "flashinfer.one_shot": ("#CC6677", "#e8909f", "o"),
    "flashinfer.two_shot": ("#DDCC77", "#DDCC77", "s"),
    "flashinfer.mnnvl": ("#661100", "#e0957f", "D"),
    "symm_mem.one_shot": ("#999933", "#bcbc52", "o"),
    "symm_mem.two_shot": ("#117733", "#46b56d", "s"),
    "multimem": ("#AA4499", "#d886ca", "D"),
    "custom": ("#44AA99", "#5fcab8", "^"),
    "nccl": ("#777777", "#a3a8b0", "v"),
    "nccl_symm": ("#882255", "#dc6a9c", "P"),
    "gloo": ("#777777", "#a3a8b0", "v"),
}
OTHER_STYLE = ("#222222", "#dde1e7", "X")

GROUND: Mapping[str, tuple[str, str]] = {
    "ink": ("#1d2530", "#e3e7ed"),
    "soft": ("#5b6675", "#9ba6b5"),
    "line": ("#e2e6eb", "#2b333e"),
    "paper": ("#ffffff", "#14181e"),
    "raised": ("#f5f6fa", "#1c222b"),
    "accent": ("#332288", "#9d92f0"),
    "good": ("#11602c", "#6cce8d"),
    "good-ground": ("#e9f3ec", "#193325"),
    "bad": ("#9a3412", "#f0a07c"),
}


def marker(path: str) -> str:
    """The path's marker, as matplotlib names shapes."""
    return STYLES.get(backend_of(path), OTHER_STYLE)[2]


def color_of(path: str) -> str:
    """The name of a path's colour: ``path-flashinfer-one_shot``."""
    known = backend_of(path)
    return f"path-{known.replace('.', '-')}" if known in STYLES else "path-other"


def on(color: str) -> str:
    """The name of the colour of words on that one: black or white."""
    return f"on-{color}"


def names() -> list[str]:
    """Every colour's name."""
    paths = [color_of(path) for path in (*STYLES, "other")]
    return [*GROUND, *paths, *map(on, paths)]


def literal(name: str, dark: bool = False) -> str:
    """``#rrggbb`` of a name.

    Raises:
        KeyError: no such colour.
    """
    if name.startswith("on-"):
        return _ink(literal(name.removeprefix("on-"), dark))
    if name in GROUND:
        return GROUND[name][dark]
    styles = {color_of(path): style for path, style in STYLES.items()}
    return (styles | {"path-other": OTHER_STYLE})[name][1 if dark else 0]


def variable(name: str) -> str:
    """The name for a style sheet."""
    return f"var(--{name})"


def sheet(dark: bool = False) -> str:
    """Declarations of all variables for a style sheet."""
    return " ".join(f"--{name}: {literal(name, dark)};" for name in names())


def _ink(color: str) -> str:
    """Black or white, whichever can be read on ``color`` (luma as in ITU-R BT.601)."""
    red, green, blue = (int(part, 16) for part in re.findall("..", color[1:]))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 115 else "#ffffff"
