"""``fusewise decode``: the command. Starts without torch; the ranks import it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

import fusewise
from fusewise.backends.registry import select
from fusewise.commands.measuring import alone
from fusewise.commands.options import (
    INTERRUPTED,
    FormatOption,
    ProfileOption,
    TpOption,
    bordered,
    check_made_for,
    integers,
    words,
)
from fusewise.commands.output import (
    check_output,
    check_picture,
    tell,
    write,
    write_file,
)
from fusewise.decode.arms import Arm, arms_for
from fusewise.decode.attempt import Attempt, run_decode
from fusewise.decode.config import (
    BATCHES,
    CPU_STEPS,
    GPU_PREFILL,
    REPEATS,
    STEPS,
    Compiler,
    DecodeSettings,
)
from fusewise.decode.models import check_split, shape_named
from fusewise.decode.results import Row, document, section
from fusewise.engines.base import EngineSettings
from fusewise.engines.registry import engine_named
from fusewise.errors import InputError
from fusewise.node import Fingerprint
from fusewise.profiles import store
from fusewise.profiles.schema import Profile
from fusewise.ranks.teams import Team, local_team, under_torchrun
from fusewise.shape import parse_dtype, parse_size
from fusewise.tune.settings import Settings

_TUNE_S = {"cpu": 10.0, "cuda": 60.0}

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="tiny, tiny-moe, tiny-llama, tiny-gemma3, qwen3-8b, qwen3-30b-a3b. "
        "Default: tiny on CPUs."
    ),
]
LayersOption = Annotated[int | None, typer.Option(help="Fewer layers than the model has.")]
DTypeChoice = Annotated[
    str | None, typer.Option("--dtype", "-d", help="Default: bf16 on GPUs, fp32 on CPUs.")
]
BatchesOption = Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8,64.")]
PrefillOption = Annotated[
    str | None, typer.Option(help="Prefill lengths, or none. Default: none on CPUs.")
]
StepsOption = Annotated[int | None, typer.Option(help="Decode steps per timing.")]
RepeatsOption = Annotated[int, typer.Option(help="Timings per arm, interleaved.")]
ContextOption = Annotated[int, typer.Option(help="Tokens in the cache at the start.")]
EngineCapOption = Annotated[str | None, typer.Option(help="Instead of the engine's own cap: 0.5M.")]
WithoutArmOption = Annotated[
    list[str] | None,
    typer.Option("--without", help="Adds the arm measured without it; may be repeated."),
]
CompilerOption = Annotated[
    Compiler | None, typer.Option(help="Default: inductor on GPUs, interpreted on CPUs.")
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON.")]
PlotOption = Annotated[Path | None, typer.Option(help="Write the picture: .svg, .png.")]


@bordered
def decode(
    model: ModelOption = None,
    layers: LayersOption = None,
    dtype: DTypeChoice = None,
    batches: BatchesOption = None,
    prefill: PrefillOption = None,
    steps: StepsOption = None,
    repeats: RepeatsOption = REPEATS,
    context: ContextOption = 128,
    profile: ProfileOption = None,
    engine_cap: EngineCapOption = None,
    without: WithoutArmOption = None,
    compiler: CompilerOption = None,
    tp: TpOption = None,
    output: OutputOption = None,
    plot: PlotOption = None,
    fmt: FormatOption = "table",
) -> None:
    """Tokens per second of a whole model under several plans.

    Never fused, up to the engine's cap, up to the effective cap, as measured.

    The model is transformers' own with random weights, split over the ranks. Without a profile
    at the model's hidden size the sizes of this run are measured first.
    """
    if under_torchrun():
        raise InputError("decode starts its ranks itself", hint="Run it without torchrun.")
    check_output(output, plot)  # before minutes are spent
    check_picture(plot)
    team = local_team(tp)
    gpu = team.device == "cuda"
    settings = DecodeSettings(
        model=model or ("qwen3-30b-a3b" if gpu else "tiny"),
        num_layers=layers,
        dtype=parse_dtype(dtype or ("bf16" if gpu else "fp32")),
        batches=integers(batches, BATCHES),
        prefill_tokens=_prefill(prefill, gpu),
        steps=steps if steps is not None else (STEPS if gpu else CPU_STEPS),
        repeats=repeats,
        context=context,
        compiler=compiler or ("inductor" if gpu else "interpreted"),
    )
    check_split(shape_named(settings.model), team.world_size)
    chosen = select(words(without))  # an unknown name now, not when the tune has ended
    node = team.node()
    cap_bytes = parse_size(engine_cap) if engine_cap is not None else None
    arms = arms_for(
        _profile(profile, node, team, settings, chosen),
        settings.hidden_size,
        _engine(node, settings),
        engine_cap_bytes=cap_bytes,
        without=words(without),
    )
    attempt = _run(team, settings, arms)
    if attempt.rows:
        title = _title(settings, node)
        write([section(attempt.rows, title, [f"{arm.name}: {arm.note}" for arm in arms])], fmt)
        _save(_record(attempt, settings, node, arms), output)
        _draw(attempt.rows, title, plot)
    _end(attempt, settings)


def _run(team: Team, settings: DecodeSettings, arms: list[Arm]) -> Attempt:
    from fusewise.commands.progress import progress

    with alone(), progress("decode") as listen:
        return run_decode(team, settings, arms, listen)


def _end(attempt: Attempt, settings: DecodeSettings) -> None:
    """Says what is missing, and ends as the run did.

    Raises:
        RankError: a rank failed; the message names it and what it was doing.
        KeyboardInterrupt: before anything was measured.
    """
    if attempt.ended_by is None:
        return
    if attempt.rows:
        missing = ", ".join(f"{phase} {tokens}" for phase, tokens in attempt.unreached(settings))
        tell([f"Not reached: {missing or 'the end'}. What was measured before is kept."])
        if isinstance(attempt.ended_by, KeyboardInterrupt):
            raise typer.Exit(INTERRUPTED)
    raise attempt.ended_by


def _save(record: dict[str, Any], output: Path | None) -> None:
    if output is None:
        return
    write_file(output, json.dumps(record, indent=1) + "\n")


def _draw(rows: list[Row], title: str, plot: Path | None) -> None:
    if plot is None:
        return
    from fusewise.decode.picture import save

    save(rows, title, plot)
    tell([f"wrote {plot}"])


def _record(
    attempt: Attempt, settings: DecodeSettings, node: Fingerprint, arms: list[Arm]
) -> dict[str, Any]:
    """What ``--output`` writes: the rows with all that is needed to read or repeat them."""
    return document(
        attempt.rows,
        settings=asdict(settings),
        fingerprint=node.model_dump(mode="json", exclude_none=True),
        arms=[_arm_record(arm, settings.hidden_size) for arm in arms],
        sites=attempt.sites,
        unreached=attempt.unreached(settings),
        command=" ".join(["fusewise", *sys.argv[1:]]),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        fusewise=fusewise.__version__,
    )


def _prefill(text: str | None, gpu: bool) -> tuple[int, ...]:
    if text == "none":
        return ()
    return integers(text, GPU_PREFILL if gpu else ())


def _title(settings: DecodeSettings, node: Fingerprint) -> str:
    layers = shape_named(settings.model, settings.num_layers).num_layers
    return (
        f"{settings.model}, {layers} layers, {settings.dtype}, {node.world_size} × {node.device}, "
        f"{settings.steps} steps, {settings.repeats} rounds, {settings.compiler}"
    )


def _engine(node: Fingerprint, settings: DecodeSettings) -> EngineSettings | None:
    if node.sm is None:
        return None
    engine = engine_named()
    version, warning = engine.stand_in(engine.version())
    tell([warning] if warning else [])
    return engine.settings(version, node, settings.dtype, os.environ, {})


def _arm_record(arm: Arm, hidden_size: int) -> dict[str, Any]:
    table = arm.plan.table_for("all_reduce_rms_norm", hidden_size)
    bands = [str(band) for band in table.bands] if table is not None else []
    return {"name": arm.name, "note": arm.note, "digest": arm.plan.digest, "bands": bands}


def _profile(
    name: str | None,
    node: Fingerprint,
    team: Team,
    settings: DecodeSettings,
    without: Collection[str],
) -> Profile:
    """The profile named, else this node's own if it knows the hidden size, else a short tune, which
    must measure something of what is then to be left out."""
    found = store.find_profile(node, settings.dtype, argument=name)
    tell(found.notes)
    if name is not None and found.profile is not None and found.profile.dtype != settings.dtype:
        raise InputError(f"{name} is of {found.profile.dtype}", got=f"--dtype {settings.dtype}")
    if found.profile is not None and (
        name is not None or settings.hidden_size in found.profile.points()
    ):
        return found.profile
    check_made_for(team.place.kind, without)
    tell([f"no profile at hidden {settings.hidden_size}: measuring for {_TUNE_S[team.device]:g} s"])
    from fusewise.commands.progress import progress
    from fusewise.ranks.supervisor import terminated_like_interrupted
    from fusewise.tune.supervise import tune_team

    smallest, largest = settings.messages[0], settings.messages[-1]
    sizes = Settings(
        dtype=settings.dtype,
        hidden_sizes=(settings.hidden_size,),
        min_bytes=smallest.message_bytes,
        max_bytes=max(largest.message_bytes, 2 * smallest.message_bytes),
        budget_s=_TUNE_S[team.device],
    )
    with alone(), terminated_like_interrupted(), progress("tune") as listen:
        measured = tune_team(team, sizes, listen)
    assert measured is not None  # this process leads: it has all ranks
    return measured
