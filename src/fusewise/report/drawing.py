"""Lines, areas and words on a sheet → SVG, or PNG where matplotlib is installed. Knows no profile.

Coordinates are pixels from the upper left. Colours are names; a ``Paint`` turns a name into what
the medium understands: a literal in a file, a style sheet's variable in a page.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fusewise.errors import InputError, UnavailableError
from fusewise.report.colors import literal
from fusewise.report.table import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.transforms import Transform

Paint = Callable[[str], str]
Place = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
_CHARACTER = 0.62  # of the font's size: no name of a path is wider than this per letter


@dataclass(frozen=True)
class Line:
    """A stroke through ``points``; ``dash`` as in SVG, empty for a solid one."""

    points: tuple[Place, ...]
    color: str
    width: float = 1.0
    dash: tuple[float, ...] = ()
    opacity: float = 1.0


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: tuple[Place, ...]
    color: str
    opacity: float = 1.0


@dataclass(frozen=True)
class Words:
    """One line of text on the baseline ``at``; ``upright`` False: read from bottom to top."""

    at: Place
    text: str
    color: str = "ink"
    size: float = 11.0
    anchor: Anchor = "start"
    bold: bool = False
    upright: bool = True

    @property
    def width(self) -> float:
        """About how wide it is, px."""
        return width_of(self.text, self.size)


Item = Line | Area | Words


@dataclass(frozen=True)
class Drawing:
    """A sheet of ``width`` by ``height`` px with its items, the lowest first."""

    width: float
    height: float
    items: tuple[Item, ...]


def width_of(text: str, size: float) -> float:
    """About how wide a line of text is, px."""
    return _CHARACTER * size * len(text)


def moved(items: Sequence[Item], dx: float, dy: float) -> list[Item]:
    """The items, shifted."""
    return [_moved(item, dx, dy) for item in items]


def _moved(item: Item, dx: float, dy: float) -> Item:
    if isinstance(item, Words):
        return replace(item, at=(item.at[0] + dx, item.at[1] + dy))
    return replace(item, points=tuple((x + dx, y + dy) for x, y in item.points))


def rectangle(left: float, top: float, right: float, bottom: float) -> tuple[Place, ...]:
    """Its corners."""
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def svg(drawing: Drawing, paint: Paint, title: str, paper: str | None = None) -> str:
    """The drawing as one ``<svg>`` element; ``paper``: a colour under everything."""
    size = f"{_number(drawing.width)} {_number(drawing.height)}"
    ground = f'<rect width="100%" height="100%" fill="{paint(paper)}"/>' if paper else ""
    body = "\n".join(_element(item, paint) for item in drawing.items)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" '
        f'font-family="{FONT}">\n<title>{_escaped(title)}</title>{ground}\n{body}\n</svg>\n'
    )


def _element(item: Item, paint: Paint) -> str:
    if isinstance(item, Words):
        x, y = map(_number, item.at)
        turned = "" if item.upright else f' transform="rotate(-90 {x} {y})"'
        weight = ' font-weight="700"' if item.bold else ""
        return (
            f'<text x="{x}" y="{y}" font-size="{_number(item.size)}" fill="{paint(item.color)}" '
            f'text-anchor="{item.anchor}"{weight}{turned}>{_escaped(item.text)}</text>'
        )
    points = " ".join(f"{_number(x)},{_number(y)}" for x, y in item.points)
    seen = "" if item.opacity == 1 else f' opacity="{_number(item.opacity)}"'
    if isinstance(item, Area):
        return f'<polygon points="{points}" fill="{paint(item.color)}"{seen}/>'
    dash = f' stroke-dasharray="{" ".join(map(_number, item.dash))}"' if item.dash else ""
    cap = "" if item.dash else ' stroke-linecap="round"'
    return (
        f'<polyline points="{points}" fill="none" stroke="{paint(item.color)}" '
        f'stroke-width="{_number(item.width)}" stroke-linejoin="round"{cap}{dash}{seen}/>'
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def _escaped(text: str) -> str:
    return escape(printable(text))


def save(drawing: Drawing, title: str, file: Path) -> None:
    """Writes SVG or PNG on light ground, by the suffix of ``file``.

    Raises:
        InputError: another suffix.
        UnavailableError: a PNG without matplotlib.
        OSError: the file cannot be written.
    """
    suffix = file.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise InputError("unknown picture format", expected=".svg or .png", got=str(file))
    if suffix == ".png":
        content = png(drawing, literal, "paper")
    else:
        content = svg(drawing, literal, title, "paper").encode()
    file.write_bytes(content)


def check_matplotlib(what: str) -> None:
    """Before work is done for a picture that could not be written.

    Raises:
        UnavailableError: matplotlib is not installed; names the extra that brings it.
    """
    if find_spec("matplotlib") is None:
        raise UnavailableError(
            f"{what} needs matplotlib, which is not installed",
            hint="Run `pip install 'fusewise[plot]'`; an .svg needs none.",
        )


def png(drawing: Drawing, paint: Paint, paper: str) -> bytes:
    """The drawing as a PNG, two pixels to each of its own, the same bytes every time.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    check_matplotlib("a .png")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's matplotlibrc says
        fig = Figure(figsize=(drawing.width / 72, drawing.height / 72), facecolor=paint(paper))
        for order, item in enumerate(drawing.items):
            artist = _artist(item, drawing.height, paint, fig.dpi_scale_trans)
            artist.set_zorder(order)
            fig.add_artist(artist)
        fig.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def _artist(item: Item, height: float, paint: Paint, inches: Transform) -> Artist:
    """What matplotlib calls the item; it counts from the lower left, and 72 px make an inch."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon
    from matplotlib.text import Text

    color = paint(item.color)
    if isinstance(item, Words):
        side = {"start": "left", "middle": "center", "end": "right"}[item.anchor]
        return Text(
            item.at[0] / 72, (height - item.at[1]) / 72, item.text, color=color,
            fontsize=item.size, fontweight="bold" if item.bold else "normal", ha=side,
            va="baseline", rotation=0 if item.upright else 90, rotation_mode="anchor",
            parse_math=False, transform=inches,
        )  # fmt: skip
    corners = [(x / 72, (height - y) / 72) for x, y in item.points]
    if isinstance(item, Area):
        return Polygon(corners, color=color, alpha=item.opacity, linewidth=0, transform=inches)
    xs, ys = zip(*corners, strict=True)
    dashes = (0, tuple(part / item.width for part in item.dash)) if item.dash else "-"
    return Line2D(
        xs, ys, color=color, linewidth=item.width, alpha=item.opacity, transform=inches,
        linestyle=dashes, solid_capstyle="round", solid_joinstyle="round",
    )  # fmt: skip
