"""``audit`` and ``cap``: an engine's own tables against a profile. Starts without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

import typer

from fusewise.commands.options import (
    FormatOption,
    HiddenOption,
    bordered,
    integers,
    resolve,
    resolve_or_fail,
    tell,
    this_node,
    write,
)
from fusewise.commands.question import Question, asks
from fusewise.engines import audit as auditing
from fusewise.engines.base import HIDDEN_SIZES, EngineSettings
from fusewise.engines.cap import CapDecision
from fusewise.profiles.store import Resolution
from fusewise.report.table import Column, Section
from fusewise.shape import format_size

_ROWS = (
    Column("hidden_size", "hidden", align="right"),
    Column("num_tokens", "tokens", align="right"),
    Column("size", "size", align="right"),
    Column("fused_path", "fused"),
    Column("fused_us", "fused", "µs", ".1f", "right"),
    Column("unfused_path", "instead"),
    Column("unfused_us", "instead", "µs", ".1f", "right"),
    Column("delta_us", "delta", "µs", "+.2f", "right"),
    Column("fused_today", "fused today"),
    Column("verdict", "verdict"),
)
_NONE = "does not fuse"
_FACTS = (Column("fact", "fact"), Column("value", "value"))
_HIDDEN = (
    Column("hidden_size", "hidden", align="right"),
    Column("cap_bytes", "cap", "B", align="right"),
    Column("max_tokens", "max tokens", align="right"),
    Column("level", "from"),
)


@bordered
@asks
def audit(question: Question, hidden: HiddenOption = None, fmt: FormatOption = "table") -> None:
    """What an engine's own setting costs on a node, and the cap that cures it.

    Compares, at every measured size, the engine's fused kernel with the all-reduce that this
    version would run instead. delta = instead − fused: above zero, fusing is faster.

    Example: fusewise audit --engine vllm --version 0.33 --profile nvidia-h200-tp8
    """
    found = resolve_or_fail(question.profile, question.dtype, question.tp, question.strict)
    assert found.profile is not None
    settings = question.settings(found.profile.fingerprint)
    result = auditing.audit(
        found.profile,
        settings,
        explicit=question.explicit_cap(),
        hidden_sizes=integers(hidden, ()),
        profile_level=found.level,
    )
    rows = [row | {"size": format_size(row["message_bytes"])} for row in result.rows_record()]
    write(
        [
            Section("summary", _FACTS, _summary(result, found.where, question), "Audit"),
            Section("sizes", _ROWS, rows, "Measured sizes"),
            Section(
                "hidden_sizes", _HIDDEN, [asdict(h) for h in result.hidden_caps],
                "Token caps", result.notes,
            ),
        ],
        fmt,
    )  # fmt: skip


def _summary(result: auditing.Audit, where: str, question: Question) -> list[dict[str, object]]:
    compared = any(row.delta_us is not None for row in result.rows)
    bands = [str(band) for band in result.bands] or ["none" if compared else "unknown"]
    best = result.best_cap_bytes
    facts: list[tuple[str, object]] = [
        ("engine", f"{question.engine_name} {result.version}"),
        ("profile", where),
        ("engine's own cap", str(result.threshold or _NONE)),
        *(("losing band", band) for band in bands),
        ("cap", _bytes(result.cap.cap_bytes)),
        ("answered by", _level(result.cap)),
        ("because", result.cap.why),
        ("cap against the best path known", "unknown" if best is None else _bytes(best)),
        ("flag", result.flag),
        ("environment", result.environment),
    ]
    return [{"fact": fact, "value": value} for fact, value in facts if value is not None]


def _level(cap: CapDecision) -> str:
    """Level and origin; a profile named by a flag is not a cap set by one."""
    measured = cap.origin in ("measured", "published")
    named = {"flag": "--profile", "environment": "FUSEWISE_PROFILE"}.get(cap.level, cap.level)
    return f"{named if measured else cap.level} ({cap.origin})"


def _bytes(size: int | None) -> str:
    return _NONE if size is None else f"{size} ({format_size(size)})"


@bordered
@asks
def cap(question: Question, hidden: HiddenOption = None, fmt: FormatOption = "table") -> None:
    """The one number an engine understands, and the exact flag to paste.

    The largest size up to which the engine's fused kernel never loses to its own alternative:
    from a profile where one answers, else by rule. As table: bytes on the first line, the flag on
    the second.
    """
    found = resolve(question.profile, question.dtype, question.tp, question.strict)
    tell(found.notes)
    settings = question.settings(
        found.profile.fingerprint if found.profile else this_node(question.tp)
    )
    decision = question.decide(found, settings)
    tokens = _tokens(question, found, settings, integers(hidden, HIDDEN_SIZES))
    if fmt == "table":
        _print_cap(decision, settings, tokens)
        return
    size = decision.cap_bytes or 0
    record = asdict(decision) | {
        "flag": settings.flag(size),
        "environment": settings.environment(size),
        **{f"max_tokens[{h}]": most for h, most in tokens.items()},
    }
    write([Section("", tuple(Column(key, key) for key in record), [record])], fmt)


def _tokens(
    question: Question, found: Resolution, settings: EngineSettings, sizes: Iterable[int]
) -> dict[int, int]:
    """Hidden size → tokens within the cap."""
    caps = {h: question.decide(found, settings, h).cap_bytes or 0 for h in sizes}
    return {h: settings.max_tokens(cap, h) for h, cap in caps.items()}


def _print_cap(decision: CapDecision, settings: EngineSettings, tokens: Mapping[int, int]) -> None:
    size = decision.cap_bytes or 0
    typer.echo(size)
    for line in (settings.flag(size), settings.environment(size)):
        if line is not None:
            typer.echo(line)
    typer.echo(f"fusewise: {_level(decision)}: {decision.why}", err=True)
    told = ", ".join(f"{most} at hidden {h}" for h, most in tokens.items())
    typer.echo(f"fusewise: tokens still fused: {told}", err=True)
    if settings.only_lowered:
        for note in settings.notes():
            typer.echo(f"fusewise: {note}", err=True)
