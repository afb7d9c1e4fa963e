"""``show`` and ``explain``: what a profile says and why a size runs on a path. Without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fusewise.backends.registry import select
from fusewise.commands.options import (
    DTypeOption,
    FormatOption,
    TpOption,
    WithoutOption,
    bordered,
    check_picture,
    resolve,
    resolve_or_fail,
    tell,
    this_node,
    words,
    write,
    write_picture,
)
from fusewise.commands.question import Question, asks
from fusewise.engines import audit as auditing
from fusewise.errors import InputError
from fusewise.operation import Op
from fusewise.profiles.bands import Plan
from fusewise.profiles.plan import Point, decide_points, derive
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import Resolution
from fusewise.report.records import report
from fusewise.report.table import Column, Section
from fusewise.shape import Shape, format_size, parse_dtype, parse_size, tokens_at

_FACTS = (Column("fact", "fact"), Column("value", "value"))


@bordered
def show(
    profile: Annotated[str | None, typer.Argument(help="A profile; default: this node's.")] = None,
    dtype: DTypeOption = "bf16",
    tp: TpOption = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the picture: .svg, .png.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    fmt: FormatOption = "table",
) -> None:
    """A profile: its node, its decisions, its measurements, what was left out."""
    check_picture(plot)
    found = resolve_or_fail(profile, dtype, tp)
    assert found.profile is not None
    plan = derive(found.profile)
    write(report(found.profile, plan), fmt)
    if plot is not None:
        write_picture(found.profile, plan, plot)
    if html is not None:
        from fusewise.report.html import page

        html.write_text(page(found.profile, plan), encoding="utf-8")
        typer.echo(f"fusewise: wrote {html}", err=True)


@bordered
@asks
def explain(
    question: Question,
    size: Annotated[str, typer.Argument(help="A message size: 256K, 0.5M, 262144.")],
    hidden: Annotated[int, typer.Option("--hidden", help="The hidden size.")] = 2048,
    op: Annotated[Op, typer.Option("--op", help="The operation.")] = "all_reduce_rms_norm",
    without: WithoutOption = None,
    fmt: FormatOption = "table",
) -> None:
    """Why a message of SIZE runs on the path it runs on, and which level decided.

    Levels, highest first: argument, flag, environment, user profile, site profile, packaged
    profile, rule, engine default.
    """
    message_bytes = parse_size(size)
    if hidden < 1:
        raise InputError("hidden size out of range", expected="at least 1", got=str(hidden))
    found = resolve(question.profile, question.dtype, question.tp, question.strict)
    tell(found.notes)
    if found.profile is not None:
        found = replace(found, profile=found.profile.without(select(words(without))))
    facts = _decision(found, op, Shape(1, hidden, parse_dtype(question.dtype)), message_bytes)
    if question.engine is not None:
        facts |= _engines_choice(question, found, message_bytes, hidden)
    rows = [
        {"fact": key.replace("_", " "), "value": value}
        for key, value in facts.items()
        if value is not None
    ]
    if fmt == "json":
        rows = [facts]
    write([Section("", _FACTS, rows)], fmt)


def _engines_choice(
    question: Question, found: Resolution, message_bytes: int, hidden_size: int
) -> dict[str, Any]:
    settings = question.settings(
        found.profile.fingerprint if found.profile else this_node(question.tp)
    )
    decision = question.decide(found, settings)
    explained = auditing.explain(settings, decision, message_bytes, hidden_size)
    named = {"engine": f"{question.engine} {settings.version}", **explained.to_record()}
    del named["message_bytes"]
    return {key if key.startswith("engine") else f"engine_{key}": v for key, v in named.items()}


def _decision(found: Resolution, op: Op, row: Shape, message_bytes: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "size": f"{format_size(message_bytes)} ({message_bytes} bytes)",
        "tokens": tokens_at(message_bytes, row.hidden_size, row.dtype),
        "operation": op,
    }
    profile = found.profile
    if profile is None or profile.dtype != row.dtype:
        why = found.where if profile is None else f"{found.where} is for {profile.dtype}"
        return facts | {"path": "the engine's own", "level": "engine default", "because": why}
    plan = derive(profile)
    band = plan.band_at(op, row.hidden_size, message_bytes)
    measured = band.origin != "engine default"
    facts |= {
        "path": band.path,
        "verdict": band.verdict if op == "all_reduce_rms_norm" else None,
        "level": found.level if measured else "engine default",
        "origin": band.origin,
        "profile": found.where,
        "band": str(band),
    }
    return facts | _evidence(profile, plan, op, row.hidden_size, message_bytes)


def _evidence(
    profile: Profile, plan: Plan, op: Op, hidden_size: int, message_bytes: int
) -> dict[str, Any]:
    """The nearest measured point: its times, its gain, what it says about ties and rounding."""
    table = plan.table_for(op, hidden_size)
    if table is None:
        return {"because": f"{op} was not measured"}
    points = decide_points(profile, op)[table.hidden_size]
    point = min(points, key=lambda p: abs(p.shape.message_bytes - message_bytes))
    facts: dict[str, Any] = {
        "validated": f"{format_size(table.validated_from)} to {format_size(table.validated_to)}",
        "hidden_size": _hidden_note(table.hidden_size, hidden_size),
        "nearest_measured": f"{format_size(point.shape.message_bytes)}: {_times(point)}",
        "gain_of_fusing": _gain(point),
        "note": point.note or None,
    }
    records = {path.name: path.numerics for path in profile.paths}
    numerics = records.get(plan.band_at(op, hidden_size, message_bytes).path)
    if numerics is not None:
        facts["numerics"] = ", ".join(f"{k} {v}" for k, v in numerics.model_dump().items())
    return facts


def _hidden_note(measured: int, asked: int) -> str:
    return str(asked) if measured == asked else f"{asked} was not measured; {measured} answers"


def _times(point: Point) -> str:
    ordered = sorted(point.medians_us.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {time_us:.2f} µs" for name, time_us in ordered)


def _gain(point: Point) -> str | None:
    if point.gain is None:
        return None
    gain = point.gain
    return f"{gain.median:+.2f} µs [{gain.low:+.2f}, {gain.high:+.2f}] against the best unfused"
