"""``fusewise vllm check`` and ``fusewise vllm patch``: what the plugin would do here, and why.

Reads vLLM's version and sources from disk; never imports vLLM and never starts it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from fusewise.commands.engine import LOSING_BANDS, level_of
from fusewise.commands.options import (
    DTypeOption,
    FormatOption,
    HiddenOption,
    ProfileOption,
    StrictOption,
    TpOption,
    bordered,
    dtype_of,
    integers,
    resolve,
    resolve_or_fail,
    this_node,
)
from fusewise.commands.output import tell, write, write_text
from fusewise.engines import on_disk
from fusewise.engines.audit import Audit
from fusewise.engines.audit import audit as audit_profile
from fusewise.engines.base import HIDDEN_SIZES
from fusewise.engines.cap import CapDecision, decide_cap
from fusewise.engines.plugin import explicit_cap, mode
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.engines.vllm.engine import settings_on
from fusewise.engines.vllm.patch import TABLE_FILE, evidence, table_patch
from fusewise.engines.vllm.seams import CONFIG_SEAMS, WORKER_SEAMS
from fusewise.engines.vllm.tables import known_version
from fusewise.errors import InputError
from fusewise.node import Fingerprint, torch_multicast
from fusewise.profiles.store import NAMED, Resolution
from fusewise.report.table import Column, Section, facts
from fusewise.shape import format_size, tokens_at

app = typer.Typer(
    help="What the vLLM plugin would do on this node. The plugin loads by itself in vLLM.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

VersionOption = Annotated[
    str | None, typer.Option("--version", help="vLLM's version. Default: the installed one.")
]
SourceOption = Annotated[
    Path | None,
    typer.Option("--source", help="The folder that holds vllm/. Default: the installed vLLM."),
]
_HIDDEN = (
    Column("hidden_size", "hidden", align="right"),
    Column("cap_bytes", "cap", "B", align="right"),
    Column("max_tokens", "max tokens", align="right"),
)


@app.command()
@bordered
def check(
    version: VersionOption = None,
    profile: ProfileOption = None,
    dtype: DTypeOption = None,
    tp: TpOption = None,
    hidden: HiddenOption = None,
    strict: StrictOption = None,
    fmt: FormatOption = "table",
) -> None:
    """What the plugin would do, and what the present setting costs.

    Reads vLLM's switches from the environment, as vLLM itself does, so run it as you would run
    vLLM.

    Example: fusewise vllm check --tp 8
    """
    found = resolve(profile, dtype, tp, strict)
    tell(found.notes)
    node = found.profile.fingerprint if found.profile else this_node(tp)
    here = found.level not in NAMED
    flags = {"multicast": torch_multicast()} if here else {}
    settings = settings_on(
        _version(version), node, dtype_of(dtype, found.profile), os.environ, flags
    )
    decision = decide_cap(
        found.profile, settings, explicit=explicit_cap(os.environ), profile_level=found.level
    )
    result = audit_profile(found.profile, settings) if found.profile else None
    sizes = integers(hidden, HIDDEN_SIZES)
    caps = [_token_cap(found, settings, size) for size in sizes]
    write(
        [
            _summary(settings, node, found, decision, result),
            Section("losing_bands", LOSING_BANDS, [], data=result.bands if result else ()),
            Section("hidden_sizes", _HIDDEN, caps, "Token caps", result.notes if result else ()),
        ],
        fmt,
    )


def _version(asked: str | None) -> str:
    """The version whose tables stand for vLLM's, said where it is another.

    Raises:
        InputError: vLLM is not installed and none was named, or nothing is known of it.
    """
    try:
        known, warning = known_version(asked or importlib.metadata.version("vllm"))
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            "vLLM is not installed here", hint="Pass --version, such as --version 0.33."
        ) from None
    tell([warning] if warning else [])
    tell([] if asked else _moved_seams())
    return known


def _moved_seams() -> list[str]:
    """A line for each reason why the plugin would do nothing in the installed vLLM."""
    folder = _installed()
    moved = on_disk.moved((*CONFIG_SEAMS, *WORKER_SEAMS), folder) if folder else []
    return [f"the plugin does nothing: this vLLM has moved {fault}" for fault in moved]


def _installed() -> Path | None:
    """The folder that holds the installed ``vllm``."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def _token_cap(found: Resolution, settings: VllmSettings, hidden_size: int) -> dict[str, object]:
    decision = decide_cap(
        found.profile,
        settings,
        explicit=explicit_cap(os.environ),
        profile_level=found.level,
        hidden_size=hidden_size,
    )
    size = decision.cap_bytes
    tokens = None if size is None else tokens_at(size, hidden_size, settings.dtype)
    return {"hidden_size": hidden_size, "cap_bytes": size, "max_tokens": tokens}


def _summary(
    settings: VllmSettings,
    node: Fingerprint,
    found: Resolution,
    decision: CapDecision,
    result: Audit | None,
) -> Section:
    switch = mode("vllm", os.environ)
    today = settings.cap_bytes()
    cap = today if switch == "off" else decision.cap_bytes
    at = today or 0
    shown: list[tuple[str, object]] = [
        ("vLLM", f"{settings.version}, tables as in {settings.tables.read_in}"),
        ("node", f"{node.world_size}x {node.device}, {node.fabric}, "
                 f"multicast {'yes' if settings.multicast else 'no'}"),
        ("profile", found.where),
        ("plugin", f"FUSEWISE_VLLM={switch}"),
        ("cap today", _size(today)),
        ("cap with fusewise", _size(cap)),
        ("answered by", level_of(decision)),
        ("because", decision.why),
        ("unfused at today's cap, today", settings.unfused_choice(at) if at else None),
        ("unfused at today's cap, capped", settings.displaced_choice(at) if at else None),
    ]  # fmt: skip
    if result is not None:
        shown += [("present cost", str(band)) for band in result.bands or ["none measured"]]
    by_hand = decision.cap_bytes
    flag = settings.flag(by_hand) if by_hand else None
    environment = settings.environment(by_hand) if by_hand else None
    record = {
        "engine": "vllm",
        "engine_version": settings.version,
        "tables_read_in": settings.tables.read_in,
        "device": node.device,
        "world_size": node.world_size,
        "fabric": node.fabric,
        "multicast": settings.multicast,
        "profile": found.where if found.profile else None,
        "plugin": switch,
        "engine_cap_bytes": today,
        "cap_bytes": cap,
        "level": decision.level,
        "origin": decision.origin,
        "why": decision.why,
        "unfused_today": settings.unfused_choice(at) if at else None,
        "unfused_capped": settings.displaced_choice(at) if at else None,
        "flag": flag,
        "environment": environment,
    }
    paste = tuple(line for line in (flag, environment) if line is not None)
    return facts("summary", record, shown, "vLLM", ("By hand:", *paste) if paste else ())


def _size(size: int | None) -> str:
    return "vLLM does not fuse here" if size is None else f"{size} ({format_size(size)})"


@app.command()
@bordered
def patch(
    source: SourceOption = None,
    version: VersionOption = None,
    profile: ProfileOption = None,
    dtype: DTypeOption = None,
    tp: TpOption = None,
) -> None:
    """A patch of vLLM's fusion table for this node, with evidence.

    Example: fusewise vllm patch --source ~/src/vllm > cap.patch
    """
    found = resolve_or_fail(profile, dtype, tp)
    assert found.profile is not None
    node = found.profile.fingerprint
    known = dtype_of(dtype, found.profile)
    settings = settings_on(_version(version), node, known, os.environ, {})
    result = audit_profile(found.profile, settings, profile_level=found.level)
    if result.cap.cap_bytes is None or result.cap.origin not in ("measured", "published"):
        raise InputError(
            "no measured cap to contribute",
            got=f"{result.cap.level}: {result.cap.why}",
            hint="Run `fusewise tune` on the node first.",
        )
    text = _table_text(source)
    patch = table_patch(text, settings, result.cap.cap_bytes)
    write_text(f"{evidence(result, found.profile, settings)}\n{patch}")


def _table_text(source: Path | None) -> str:
    folder = source or _installed()
    if folder is None:
        raise InputError("vLLM is not installed here", hint="Pass --source FOLDER.")
    try:
        return (folder / TABLE_FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"no {TABLE_FILE} in {folder}", got=str(error.strerror), hint="Pass --source FOLDER."
        ) from error
