"""``fusewise profile``: look at profiles, compare, merge, put back and hand on. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fusewise.commands import analyse
from fusewise.commands.options import (
    DTypeOption,
    FormatOption,
    TpOption,
    bordered,
    named_profile,
    own_name,
)
from fusewise.commands.output import tell, write, write_text
from fusewise.errors import FusewiseError, ProfileError
from fusewise.profiles import history, shelf, store
from fusewise.profiles.compare import compare as compared
from fusewise.profiles.merge import extended
from fusewise.report.comparison import comparison
from fusewise.report.table import Column, Section

app = typer.Typer(
    help=(
        "The profiles of this machine. A profile is called by its file, its name or a part of it; "
        "NAME@DATE is what it was before it was replaced, @DATE or @ of this node's own."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("show")(analyse.show)

_OWN = "Default: this node's."
_LIST = (
    Column("name", "name"),
    Column("level", "from"),
    Column("created", "measured", drop=2),
    Column("samples", "samples", align="right", drop=3),
    Column("earlier", "earlier", align="right", drop=1),
    Column("problem", "problem"),
)
_EARLIER = (
    Column("date", "@date"),
    Column("created", "measured"),
    Column("samples", "samples", align="right"),
    Column("problem", "problem"),
)


@app.command("list")
@bordered
def list_all(
    name: Annotated[str | None, typer.Argument(help="Its earlier versions, by date.")] = None,
    fmt: FormatOption = "table",
) -> None:
    """Every profile there is, or the earlier versions of one.

    Of the user, of the site, and those that come with the package.
    """
    if name is not None:
        rows = [{"date": file.stem, **_content(file)} for file in shelf.kept(name).earlier()]
        notes = () if rows else ("Nothing of it was replaced yet.",)
        write([Section("earlier", _shown(_EARLIER, rows), rows, f"Earlier: {name}", notes)], fmt)
        return
    rows = [
        {
            "name": one.name,
            "level": one.level.removesuffix(" profile"),
            **_content(one.file or one.name),
            "earlier": len(one.earlier()),
        }
        for one in shelf.shelf()
    ]
    write([Section("profiles", _shown(_LIST, rows), rows, "Profiles")], fmt)


def _content(file: Path | str) -> dict[str, object]:
    try:
        found = store.load(file)
    except FusewiseError as error:  # a broken one is named, and the others are listed
        return {"created": None, "samples": None, "problem": str(error)}
    made = found.provenance.created
    return {"created": made, "samples": len(found.samples), "problem": None}


def _shown(columns: tuple[Column, ...], rows: list[dict[str, object]]) -> tuple[Column, ...]:
    ill = any(row["problem"] for row in rows)
    return columns if ill else columns[:-1]


@app.command()
@bordered
def compare(
    first: Annotated[str, typer.Argument(help="A profile.")],
    second: Annotated[str | None, typer.Argument(help=f"Another. {_OWN}")] = None,
    every: Annotated[bool, typer.Option("--all", help="Times that do not differ, too.")] = False,
    dtype: DTypeOption = None,
    tp: TpOption = None,
    fmt: FormatOption = "table",
) -> None:
    """Where two nodes, or two dates of one, differ beyond noise.

    Example, what changed since this node was last measured: fusewise profile compare @
    """
    ours, theirs = named_profile(first, dtype, tp), named_profile(second, dtype, tp)
    write(comparison(ours, theirs, compared(ours, theirs), every), fmt)


@app.command()
@bordered
def merge(
    first: Annotated[str, typer.Argument(help="A profile.")],
    second: Annotated[str, typer.Argument(help="Another of the same node.")],
    into: Annotated[
        Path | None, typer.Option("--into", help="Folder to keep it in. Default: the user's.")
    ] = None,
    dtype: DTypeOption = None,
    tp: TpOption = None,
) -> None:
    """Makes one profile of two of one node.

    It is kept as that node's, and what was kept before goes to the history. A shape that both
    measured is the newer one's alone.
    """
    pair = [named_profile(name, dtype, tp) for name in (first, second)]
    older, newer = sorted(pair, key=lambda profile: profile.provenance.created)
    both = extended(older, newer)
    path = history.replace(both, into or store.user_dir())
    tell([f"wrote {path}: {len(both.samples)} samples of {len(older.samples)} and "
          f"{len(newer.samples)}"])  # fmt: skip


@app.command()
@bordered
def restore(
    name: Annotated[
        str, typer.Argument(help="NAME@DATE, or NAME@ for its newest earlier version.")
    ] = "@",
    dtype: DTypeOption = None,
    tp: TpOption = None,
) -> None:
    """Puts an earlier profile back.

    By default this node's, its newest version that is whole; the present one goes to the history.
    """
    called, at, date = name.rpartition("@")
    if not at:
        called, date = date, ""
    one = shelf.kept(called or own_name(dtype, tp))
    earlier = _newest_whole(shelf.before(one, date))
    assert one.file is not None  # packaged ones have no earlier version
    history.restore(one.file, earlier)
    tell([f"{one.file} is again what was written {earlier.stem}"])


def _newest_whole(versions: Sequence[Path]) -> Path:
    """The first that is a profile; says what is wrong with those before it.

    Raises:
        ProfileError: none is.
    """
    for version in versions[:-1]:
        try:
            store.load(version)
        except ProfileError as error:
            tell([f"passed over {version.stem}: {error}"])
        else:
            return version
    store.load(versions[-1])
    return versions[-1]


@app.command()
@bordered
def export(
    name: Annotated[str | None, typer.Argument(help=f"A profile. {_OWN}")] = None,
    into: Annotated[
        Path | None,
        typer.Option("--into", help="A folder, such as a site's. Default: stdout."),
    ] = None,
    dtype: DTypeOption = None,
    tp: TpOption = None,
) -> None:
    """Hands a profile on, as its file.

    To stdout, or under its own name into a folder, where all users may read it: a site keeps its
    profiles in FUSEWISE_SITE_DIR.
    """
    profile = named_profile(name, dtype, tp)
    if into is None:
        write_text(profile.to_json())
        return
    new = not into.exists()
    path = history.replace(profile, into)
    path.chmod(0o644)
    if new:
        into.chmod(0o755)
    tell([f"wrote {path}"])
