"""``audit`` and ``cap``: an engine's own tables against a profile. Starts without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fusewise.commands.options import (
    FormatOption,
    HiddenOption,
    bordered,
    integers,
    resolve,
    resolve_or_fail,
)
from fusewise.commands.output import tell, write, write_text
from fusewise.commands.question import Question, asks
from fusewise.engines import audit as auditing
from fusewise.engines.base import HIDDEN_SIZES, EngineSettings
from fusewise.engines.cap import CapDecision
from fusewise.errors import CheckError, InputError
from fusewise.node import kernels_digest
from fusewise.operation import all_reduce_of
from fusewise.report.table import Column, Section, facts
from fusewise.shape import format_size

_ROWS = (
    Column("hidden_size", "hidden", align="right"),
    Column("num_tokens", "tokens", align="right", drop=4),
    Column("size", "size", align="right"),
    Column("fused_path", "fused", drop=3),
    Column("fused_us", "fused\nµs", "", ".1f", "right"),
    Column("instead", "instead"),
    Column("unfused_us", "instead\nµs", "", ".1f", "right"),
    Column("delta_us", "delta\nµs", "", "+.2f", "right"),
    Column("fused_today", "fused\ntoday", drop=2),
    Column("verdict", "verdict"),
)
_NONE = "does not fuse"
LOSING_BANDS = tuple(
    Column(name, name)
    for name in (
        "hidden_size", "above_bytes", "to_bytes", "unfused_path", "worst_cost_us",
        "worst_at_bytes",
    )
)  # fmt: skip
_HIDDEN = (
    Column("hidden_size", "hidden", align="right"),
    Column("cap_bytes", "cap", "B", align="right"),
    Column("max_tokens", "max tokens", align="right"),
    Column("level", "from"),
)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*(%?)")


@bordered
@asks
def audit(
    question: Question,
    hidden: HiddenOption = None,
    check: Annotated[
        str | None,
        typer.Option(
            "--check", help="Exit with 7 where fusing loses more than this share: 2%, 0.02."
        ),
    ] = None,
    fmt: FormatOption = "table",
) -> None:
    """What an engine's own setting costs, and the cap that cures it.

    Compares, at every measured size, the engine's fused kernel with the all-reduce that this
    version would run instead. delta = instead − fused: above zero, fusing is faster. The engine's
    own environment variables count as they would for the engine.

    Example: fusewise audit --engine vllm --version 0.33 --profile nvidia-h200-tp8
    """
    limit = None if check is None else _share(check)
    found = resolve_or_fail(question.profile, question.dtype, question.tp, question.strict)
    assert found.profile is not None
    settings = question.settings(found)
    result = auditing.audit(
        found.profile,
        settings,
        explicit=question.explicit_cap(),
        hidden_sizes=integers(hidden, ()),
        profile_level=found.level,
        kernels=kernels_digest(),
    )
    write(
        [
            _summary(result, found.where, question),
            Section("losing_bands", LOSING_BANDS, [], data=result.bands),
            _sizes(result),
            Section(
                "hidden_sizes", _HIDDEN, [asdict(h) for h in result.hidden_caps],
                "Token caps", result.notes,
            ),
        ],
        fmt, main="sizes",
    )  # fmt: skip
    if limit is not None:
        _check(result, limit, settings)


def _sizes(result: auditing.Audit) -> Section:
    data = result.rows_record()
    more = [
        {"size": format_size(row["message_bytes"]), "instead": all_reduce_of(row["unfused_path"])}
        for row in data
    ]
    shown = [row | extra for row, extra in zip(data, more, strict=True)]
    note = "instead: this all-reduce, then the norm. delta = instead − fused."
    return Section("sizes", _ROWS, shown, "Measured sizes", (note,), data)


def _summary(result: auditing.Audit, where: str, question: Question) -> Section:
    compared = any(row.delta_us is not None for row in result.rows)
    bands = [str(band) for band in result.bands] or ["none" if compared else "unknown"]
    best, own = result.best_cap_bytes, result.own
    shown: list[tuple[str, object]] = [
        ("engine", f"{question.engine_name} {result.version}"),
        ("profile", where),
        ("engine's own cap", str(result.threshold or _NONE)),
        *(("losing band", band) for band in bands),
        ("cap", _bytes(result.cap.cap_bytes)),
        ("answered by", level_of(result.cap)),
        ("because", result.cap.why),
        ("cap against the best path known", "unknown" if best is None else _bytes(best)),
        *([("our kernels", str(own))] if own else []),
    ]
    record = {
        "engine": question.engine_name,
        "engine_version": result.version,
        "profile": where,
        "source": result.source,
        "compared": compared,
        "engine_cap_bytes": result.threshold.message_bytes if result.threshold else None,
        "engine_cap_tokens": result.threshold.num_tokens if result.threshold else None,
        **asdict(result.cap),
        "best_cap_bytes": best,
        "native_compared": own.compared if own else None,
        "native_faster_at": own.faster_at if own else None,
        "native_most_us": own.most_us if own else None,
        "flag": result.flag,
        "environment": result.environment,
    }
    paste = tuple(line for line in (result.flag, result.environment) if line is not None)
    return facts("summary", record, shown, "Audit", ("To paste:", *paste) if paste else ())


def _share(text: str) -> float:
    match = _PERCENT.fullmatch(text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share < 1:
        raise InputError("--check is no share", expected="a form such as 2% or 0.02", got=text)
    return share


def _check(result: auditing.Audit, limit: float, settings: EngineSettings) -> None:
    """Raises CheckError where fusing loses by more than ``limit``, or nobody can tell.

    What counts is what the engine fuses today, or up to the cap that was set explicitly.
    """
    cap = result.cap.cap_bytes if result.cap.origin == "explicit" else None
    own = cap is None or settings.only_lowered
    fused = [
        row
        for row in result.rows
        if (row.fused_today or not own) and (cap is None or row.message_bytes <= cap)
    ]
    losses = {
        row: -row.delta_us / row.unfused_us
        for row in fused
        if row.verdict == "fusion loses" and row.delta_us is not None and row.unfused_us
    }
    if fused and all(row.verdict == "not measured" for row in fused):
        raise CheckError(
            "nothing could be compared",
            expected="times of the engine's fused kernel and of what runs instead",
            hint="Run `fusewise tune` on this node.",
        )
    worst = max(losses, key=lambda row: losses[row], default=None)
    if worst is not None and losses[worst] > limit:
        raise CheckError(
            f"fusing loses {losses[worst]:.1%} at {format_size(worst.message_bytes)}, hidden "
            f"{worst.hidden_size}, against {worst.unfused_path}",
            expected=f"at most {limit:.1%}",
            hint="`fusewise cap` prints the cap that cures it.",
        )


def level_of(cap: CapDecision) -> str:
    """Level and origin; a profile named by a flag is not a cap set by one."""
    measured = cap.origin in ("measured", "published")
    named = {"flag": "--profile", "environment": "FUSEWISE_PROFILE"}.get(cap.level, cap.level)
    if cap.level == cap.origin:
        return cap.level
    return f"{named if measured else cap.level} ({cap.origin})"


def _bytes(size: int | None) -> str:
    return _NONE if size is None else f"{size} ({format_size(size)})"


@bordered
@asks
def cap(question: Question, hidden: HiddenOption = None, fmt: FormatOption = "table") -> None:
    """The one number an engine understands, and the flag to paste.

    The largest size up to which the engine's fused kernel never loses to its own alternative:
    from a profile where one answers, else by rule; with --hidden at those hidden sizes only. As
    table: bytes on the first line, the flag on the second. The engine's own environment variables
    count as they would for the engine.
    """
    found = resolve(question.profile, question.dtype, question.tp, question.strict)
    tell(found.notes)
    settings = question.settings(found)
    named = integers(hidden, ())
    decision = question.decide(found, settings, named)
    rows = [
        _hidden_row(size, question.decide(found, settings, (size,)), settings)
        for size in named or HIDDEN_SIZES
    ]
    if fmt == "table":
        _print_cap(decision, settings, rows)
        return
    flag, environment = _to_paste(decision, settings)
    record = asdict(decision) | {"flag": flag, "environment": environment}
    columns = tuple(Column(key, key) for key in record)
    write([Section("cap", columns, [record]), Section("hidden_sizes", _HIDDEN, rows)], fmt)


def _hidden_row(size: int, decision: CapDecision, settings: EngineSettings) -> dict[str, Any]:
    cap_bytes = decision.cap_bytes
    tokens = None if cap_bytes is None else settings.max_tokens(cap_bytes, size)
    return {
        "hidden_size": size,
        "cap_bytes": cap_bytes,
        "max_tokens": tokens,
        "level": decision.level,
    }


def _to_paste(decision: CapDecision, settings: EngineSettings) -> tuple[str | None, str | None]:
    """Flag and variable; neither where the engine does not fuse."""
    size = decision.cap_bytes
    return (None, None) if size is None else (settings.flag(size), settings.environment(size))


def _print_cap(
    decision: CapDecision, settings: EngineSettings, rows: Sequence[Mapping[str, Any]]
) -> None:
    lines = (str(decision.cap_bytes or 0), *_to_paste(decision, settings))
    write_text("\n".join(line for line in lines if line is not None))
    tell([f"{level_of(decision)}: {decision.why}"])
    sizes = {row["hidden_size"]: row["max_tokens"] or 0 for row in rows}
    if not settings.counts_tokens:  # the number above is one for all
        sizes = {h: settings.max_tokens(decision.cap_bytes or 0, h) for h in sizes}
    told = ", ".join(f"{tokens} at hidden {hidden}" for hidden, tokens in sizes.items())
    tell([f"tokens still fused: {told}", *(settings.notes() if settings.only_lowered else ())])
