"""``audit`` and ``cap``: an engine's own tables against a profile. Starts without torch."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import asdict
from typing import Annotated

import typer

from fusewise.commands.options import (
    DTypeOption,
    FormatOption,
    HiddenOption,
    ProfileOption,
    TpOption,
    bordered,
    integers,
    resolve,
    resolve_or_fail,
    tell,
    this_node,
    write,
)
from fusewise.engines import audit as auditing
from fusewise.engines.cap import CapDecision, ExplicitCap, decide_cap
from fusewise.engines.vllm.dispatch import VllmSettings, vllm_environment, vllm_flag
from fusewise.engines.vllm.tables import TABLES
from fusewise.errors import InputError
from fusewise.node import Fingerprint
from fusewise.report.table import Column, Section
from fusewise.shape import format_size, parse_dtype, parse_size, tokens_at

EngineOption = Annotated[str, typer.Option("--engine", help="The engine: vllm.")]
VersionOption = Annotated[
    str | None,
    typer.Option("--version", help="The engine's version. Default: the installed one, or 0.33."),
]
MulticastOption = Annotated[
    bool | None,
    typer.Option("--multicast/--no-multicast", help="Whether NVLink multicast can be used."),
]
NcclSymmOption = Annotated[
    bool, typer.Option("--nccl-symm-mem", help="As with VLLM_USE_NCCL_SYMM_MEM=1.")
]
SymmOption = Annotated[
    bool,
    typer.Option("--symm-mem/--no-symm-mem", help="As with VLLM_ALLREDUCE_USE_SYMM_MEM=1 or 0."),
]
CapOption = Annotated[
    str | None, typer.Option("--cap", help="An explicit cap; wins over everything.")
]

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
_FACTS = (Column("fact", "fact"), Column("value", "value"))
_HIDDEN = (
    Column("hidden_size", "hidden", align="right"),
    Column("cap_bytes", "cap", "B", align="right"),
    Column("max_tokens", "max tokens", align="right"),
    Column("level", "from"),
)


def settings_for(
    node: Fingerprint,
    engine: str,
    version: str | None,
    dtype: str,
    multicast: bool | None,
    nccl_symm_mem: bool,
    symm_mem: bool,
) -> VllmSettings:
    """The engine on that node, as the options describe it.

    Raises:
        InputError: an engine or version whose tables are not known, or a node without GPUs.
    """
    if engine != "vllm":
        raise InputError("unknown engine", expected="vllm", got=repr(engine))
    if node.sm is None:
        raise InputError(
            "an engine's tables are about GPUs",
            expected="a profile of a GPU node",
            got=f"one of {node.device}",
            hint="Pass --profile nvidia-h200-tp8 to see the published one.",
        )
    return VllmSettings(
        version=version or _installed_version(),
        sm=node.sm,
        world_size=node.world_size,
        multicast=node.multicast if multicast is None else multicast,
        dtype=parse_dtype(dtype),
        nccl_symm_mem=nccl_symm_mem,
        symm_mem=symm_mem,
    )


def _installed_version() -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return list(TABLES)[-1]


def explicit_cap(cap: str | None) -> ExplicitCap | None:
    """The cap of ``--cap``, else of ``FUSEWISE_CAP``, with the level it came from."""
    if cap is not None:
        return ExplicitCap(parse_size(cap), "flag")
    named = os.environ.get("FUSEWISE_CAP")
    return ExplicitCap(parse_size(named), "environment") if named else None


@bordered
def audit(
    engine: EngineOption = "vllm",
    version: VersionOption = None,
    profile: ProfileOption = None,
    dtype: DTypeOption = "bf16",
    tp: TpOption = None,
    hidden: HiddenOption = None,
    multicast: MulticastOption = None,
    nccl_symm_mem: NcclSymmOption = False,
    symm_mem: SymmOption = True,
    cap: CapOption = None,
    fmt: FormatOption = "table",
) -> None:
    """What an engine's own setting costs on a node, and the cap that cures it.

    Compares, at every measured size, the engine's fused kernel with the all-reduce that this
    version would run instead. delta = instead − fused: above zero, fusing is faster.

    Example: fusewise audit --engine vllm --version 0.33 --profile nvidia-h200-tp8
    """
    found = resolve_or_fail(profile, dtype, tp)
    assert found.profile is not None
    node = found.profile.fingerprint
    settings = settings_for(node, engine, version, dtype, multicast, nccl_symm_mem, symm_mem)
    result = auditing.audit(
        found.profile,
        settings,
        explicit=explicit_cap(cap),
        hidden_sizes=integers(hidden, ()),
        profile_level=found.level,
    )
    rows = [row | {"size": format_size(row["message_bytes"])} for row in result.rows_record()]
    write(
        [
            Section("summary", _FACTS, _summary(result, found.where), "Audit"),
            Section("sizes", _ROWS, rows, "Measured sizes"),
            Section(
                "hidden_sizes", _HIDDEN, [asdict(h) for h in result.hidden_caps],
                "Token caps", result.notes,
            ),
        ],
        fmt,
    )  # fmt: skip


def _summary(result: auditing.Audit, where: str) -> list[dict[str, object]]:
    bands = [str(band) for band in result.bands] or ["none"]
    best = result.best_cap_bytes
    facts: list[tuple[str, object]] = [
        ("engine", f"vllm {result.version}"),
        ("profile", where),
        ("engine's own cap", _bytes(result.engine_cap_bytes)),
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
    return "does not fuse" if size is None else f"{size} ({format_size(size)})"


@bordered
def cap(
    engine: EngineOption = "vllm",
    version: VersionOption = None,
    profile: ProfileOption = None,
    dtype: DTypeOption = "bf16",
    tp: TpOption = None,
    hidden: HiddenOption = None,
    multicast: MulticastOption = None,
    nccl_symm_mem: NcclSymmOption = False,
    symm_mem: SymmOption = True,
    cap: CapOption = None,
    fmt: FormatOption = "table",
) -> None:
    """The one number an engine understands, and the exact flag to paste.

    The largest size up to which the engine's fused kernel never loses to its own alternative:
    from a profile where one answers, else by rule. As table: bytes on the first line, the flag on
    the second.
    """
    found = resolve(profile, dtype, tp)
    tell(found.notes)
    node = found.profile.fingerprint if found.profile else this_node(tp)
    settings = settings_for(node, engine, version, dtype, multicast, nccl_symm_mem, symm_mem)
    decision = decide_cap(
        found.profile, settings, explicit=explicit_cap(cap), profile_level=found.level
    )
    if fmt == "table":
        _print_cap(decision, settings)
        return
    sizes = integers(hidden, (2048, 4096, 7168))
    size = decision.cap_bytes or 0
    record = asdict(decision) | {
        "flag": vllm_flag(size),
        "environment": vllm_environment(settings, size),
        **{f"max_tokens[{h}]": tokens_at(size, h, settings.dtype) for h in sizes},
    }
    write([Section("", tuple(Column(key, key) for key in record), [record])], fmt)


def _print_cap(decision: CapDecision, settings: VllmSettings) -> None:
    size = decision.cap_bytes or 0
    typer.echo(size)
    typer.echo(vllm_flag(size))
    environment = vllm_environment(settings, size)
    if environment:
        typer.echo(environment)
    typer.echo(f"fusewise: {_level(decision)}: {decision.why}", err=True)
