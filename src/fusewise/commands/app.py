"""The command line: ``fusewise tune | verify | bench | show | explain | audit | cap | ...``.

Only wires commands together. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import typer

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

app = typer.Typer(
    name="fusewise",
    help=(
        "Measures every way to compute all_reduce + residual + RMSNorm on this node, decides per "
        "message size, explains the decision. Start with: fusewise tune"
    ),
    epilog=(
        "Exit codes: 0 done, 2 bad input, 3 unavailable here, 4 ranks failed, 5 profile broken "
        "or missing, 6 wrong results, 130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
