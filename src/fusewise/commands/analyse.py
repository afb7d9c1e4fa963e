"""``show`` and ``explain``: what a profile says and why a size runs on a path. Without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fusewise.backends.registry import select
from fusewise.commands.engine import level_of
from fusewise.commands.options import (
    DTypeOption,
    FormatOption,
    ProfileOption,
    TpOption,
    WithoutOption,
    bordered,
    check_asked,
    dtype_of,
    named_profile,
    resolve,
    resolve_or_fail,
    words,
)
from fusewise.commands.output import (
    check_output,
    check_picture,
    tell,
    write,
    write_file,
    write_picture,
)
from fusewise.commands.question import Question, asks
from fusewise.engines import audit as auditing
from fusewise.errors import InputError
from fusewise.operation import Op
from fusewise.profiles.plan import derive
from fusewise.profiles.store import Resolution
from fusewise.report.reasons import explained, reasons
from fusewise.report.records import tables
from fusewise.report.table import Section, facts
from fusewise.shape import Shape, format_size, parse_size


@bordered
def show(
    named: Annotated[
        str | None,
        typer.Argument(metavar="PROFILE", help="A file, a name, a part of one, or NAME@DATE."),
    ] = None,
    profile: ProfileOption = None,
    dtype: DTypeOption = None,
    tp: TpOption = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the picture: .svg, .png.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    fmt: FormatOption = "table",
) -> None:
    """A profile: its node, its decisions, every measurement."""
    if named is not None and profile is not None:
        raise InputError("two profiles", expected="one", got=f"{named} and --profile {profile}")
    check_picture(plot)
    check_output(html, plot)
    if named is None:
        found = resolve_or_fail(profile, dtype, tp).profile
        assert found is not None
    else:
        found = named_profile(named, dtype, tp)
        check_asked(found, named, dtype, tp)
    plan = derive(found)
    write(tables(found, plan), fmt, main="measurements")
    if plot is not None:
        write_picture(found, plan, plot)
    if html is not None:
        from fusewise.report.html import page

        write_file(html, page(found, plan))


@bordered
@asks
def explain(
    question: Question,
    size: Annotated[
        str, typer.Argument(metavar="SIZE", help="A message size: 256K, 0.5M, 262144.")
    ],
    hidden: Annotated[int, typer.Option("--hidden", help="The hidden size.")] = 2048,
    op: Annotated[Op, typer.Option("--op", help="The operation.")] = "all_reduce_rms_norm",
    without: WithoutOption = None,
    fmt: FormatOption = "table",
) -> None:
    """Why a message of SIZE runs on its path, and who decided.

    Levels, highest first: argument, flag, environment, user profile, site profile, packaged
    profile, rule, engine default. Asked about an engine (--engine, or any option that only an
    engine answers), it says what that runs too.
    """
    message_bytes = parse_size(size)
    if hidden < 1:
        raise InputError("hidden size out of range", expected="at least 1", got=str(hidden))
    excluded = select(words(without))
    found = resolve(question.profile, question.dtype, question.tp, question.strict)
    tell(found.notes)
    dtype = dtype_of(question.dtype, found.profile)
    if found.profile is not None:
        less = found.profile.without(excluded)
        where = found.where if less is not None else f"{found.where} has no other path"
        found = replace(found, profile=less, where=where)
    answer = reasons(found, op, Shape(1, hidden, dtype), message_bytes)
    sections = list(explained(answer))
    if question.about_engine:
        sections.append(_engines_choice(question, found, message_bytes, hidden))
    write(sections, fmt)


def _engines_choice(
    question: Question, found: Resolution, message_bytes: int, hidden_size: int
) -> Section:
    settings = question.settings(found)
    decision = question.decide(found, settings, (hidden_size,))
    choice = auditing.explain(settings, decision, message_bytes, hidden_size)
    engine = {"engine": question.engine_name, "engine_version": settings.version}
    shown = [
        ("engine", f"{question.engine_name} {settings.version}"),
        ("today", choice.today),
        ("with cap", choice.with_cap),
        ("engine's own cap", _bytes(choice.engine_cap_bytes)),
        ("cap", _bytes(choice.cap_bytes)),
        ("answered by", level_of(decision)),
        ("because", choice.why),
    ]
    return facts("engine", engine | choice.to_record(), shown, "Engine")


def _bytes(size: int | None) -> str | None:
    return None if size is None else f"{size} ({format_size(size)})"
