"""``report``: a profile as one page to read and to send on. Without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusewise.commands.options import bordered, resolve_or_fail
from fusewise.commands.output import check_output, write_file, write_text
from fusewise.commands.question import Question, asks
from fusewise.node import kernels_digest
from fusewise.profiles.plan import derive

_STDOUT = Path("-")


@bordered
@asks
def report(
    question: Question,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page's file; - is stdout.")
    ] = Path("fusewise.html"),
) -> None:
    """One page of a profile: what to do next, pictures, every table.

    The page needs nothing from elsewhere, follows the light or dark scheme, and names the cap
    of every known engine. --engine, or any option that only an engine answers, asks about one.

    Example: fusewise report --profile nvidia-h200-tp8 --engine vllm --version 0.22
    """
    from fusewise.report.advice import of_all_engines, of_engine  # what draws is read when needed
    from fusewise.report.html import page

    check_output(None if output == _STDOUT else output)
    found = resolve_or_fail(question.profile, question.dtype, question.tp, question.strict)
    assert found.profile is not None
    profile = found.profile
    digest = kernels_digest()
    advice = of_all_engines(profile, found.level, digest)
    if question.about_engine:
        settings = question.settings(found)
        explicit = question.explicit_cap()
        told = of_engine(question.engine_name, profile, settings, found.level, explicit, digest)
        advice = [told]
    text = page(profile, derive(profile), advice=advice)
    if output == _STDOUT:
        write_text(text)
        return
    write_file(output, text)
