"""The command line: ``fusewise tune | verify | bench | show | explain | audit | cap | ...``.

Only wires commands together. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

from typing import Annotated

import typer

import fusewise
from fusewise.commands import (
    analyse,
    decode,
    doctor,
    engine,
    measure,
    profile,
    report,
    verify,
    vllm,
)
from fusewise.errors import EXIT_CODES

app = typer.Typer(
    name="fusewise",
    help=(
        "Measures every way to compute all_reduce + residual + RMSNorm on this node, decides per "
        "message size, explains the decision. Start with: fusewise tune"
    ),
    epilog=f"Exit codes: {'; '.join(f'{code} {what}' for code, what in EXIT_CODES.items())}.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich cuts the names of options where a terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fusewise {fusewise.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it, and exit."),
    ] = False,
) -> None:
    """Options of the program itself."""


app.command()(measure.tune)
app.command()(verify.verify)
app.command()(measure.bench)
app.command()(analyse.show)
app.command()(analyse.explain)
app.command()(report.report)
app.command()(engine.audit)
app.command()(engine.cap)
app.command()(doctor.doctor)
app.command()(decode.decode)
app.add_typer(profile.app, name="profile")
app.add_typer(vllm.app, name="vllm")
