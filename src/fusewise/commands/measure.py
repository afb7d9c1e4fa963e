"""``tune`` and ``bench``: the commands that start ranks and measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fusewise.commands.options import (
    DTypeOption,
    FormatOption,
    HiddenOption,
    TpOption,
    WithoutOption,
    bordered,
    check_picture,
    dtypes,
    integers,
    seconds,
    words,
    write,
    write_picture,
)
from fusewise.errors import InputError
from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile, Sample
from fusewise.ranks.teams import Team, local_team, torchrun_team, under_torchrun
from fusewise.report.bench_table import bench as bench_section
from fusewise.report.records import report
from fusewise.report.table import Section
from fusewise.shape import DType, parse_dtype, parse_size
from fusewise.tune.settings import (
    CPU_HIDDEN_SIZES,
    CPU_MAX_BYTES,
    GPU_HIDDEN_SIZES,
    GPU_MAX_BYTES,
    MIN_BYTES,
    ROUNDS,
    Settings,
)

MinOption = Annotated[str, typer.Option("--min-bytes", "-b", help="Smallest message.")]
MaxOption = Annotated[
    str | None,
    typer.Option("--max-bytes", "-e", help="Largest message. Default: 64M on GPUs, 4M on CPUs."),
]
RoundsOption = Annotated[int, typer.Option("--rounds", help="Interleaved rounds per size.")]


@bordered
def tune(
    hidden: HiddenOption = None,
    dtype: Annotated[str, typer.Option("--dtype", "-d", help="bf16, or a list: bf16,fp16.")] = (
        "bf16"
    ),
    tp: TpOption = None,
    min_size: MinOption = str(MIN_BYTES),
    max_size: MaxOption = None,
    budget: Annotated[str, typer.Option("--budget", help="Time to measure: 90s, 2m.")] = "90s",
    without: WithoutOption = None,
    rounds: RoundsOption = ROUNDS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the profile.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the picture: .svg, .png.")] = None,
    fmt: FormatOption = "table",
) -> None:
    """Measure this node, write its profile, print the table and what was decided.

    Starts one rank per GPU (two CPU ranks without GPUs), or joins torchrun's:
    torchrun --nproc-per-node 8 -m fusewise tune. A provider that fails, crashes or hangs is left
    out with its reason.
    """
    # Before minutes are spent: whether their result can be written.
    store.private_directory(output or store.user_dir())
    if plot is not None:
        check_picture(plot)
    with _team(tp) as team:
        for one in dtypes(dtype):
            settings = _settings(team, hidden, one, min_size, max_size, budget, rounds, without)
            profile = _measure(team, settings)
            if profile is None:
                continue
            plan = derive(profile)
            prints = team.world is None or team.world.rank == 0
            if prints:
                write(report(profile, plan), fmt)
            path = store.save(profile, output)
            if not prints:
                continue
            typer.echo(f"fusewise: wrote {path}", err=True)
            if plot is not None:
                write_picture(profile, plan, plot)


def _measure(team: Team, settings: Settings) -> Profile | None:
    from fusewise.commands.progress import progress
    from fusewise.ranks.supervisor import terminated_like_interrupted
    from fusewise.tune.supervise import tune_everywhere

    title = f"tune {settings.dtype}"
    with terminated_like_interrupted(), progress(title) as listen:
        return tune_everywhere(team, settings, listen)


@bordered
def bench(
    hidden: HiddenOption = None,
    dtype: DTypeOption = "bf16",
    tp: TpOption = None,
    min_size: MinOption = str(MIN_BYTES),
    max_size: MaxOption = None,
    without: WithoutOption = None,
    rounds: RoundsOption = ROUNDS,
    fmt: FormatOption = "table",
) -> None:
    """Every path at every size, in nccl-tests' columns with #wrong. Decides and writes nothing."""
    from fusewise.commands.progress import progress
    from fusewise.ranks.supervisor import terminated_like_interrupted
    from fusewise.tune.supervise import bench_team

    with _team(tp) as team:
        one = parse_dtype(dtype)
        settings = _settings(team, hidden, one, min_size, max_size, "24h", rounds, without)
        with terminated_like_interrupted(), progress("bench") as listen:
            found = bench_team(team, settings, listen)
        if found is not None:
            write([_bench_section(found, one, team.world_size)], fmt)


def _bench_section(found: list[tuple[Sample, int]], dtype: DType, world_size: int) -> Section:
    wrong = {(s.op, s.path, s.num_tokens, s.hidden_size): count for s, count in found}
    return bench_section([sample for sample, _ in found], dtype, world_size, wrong)


@contextmanager
def _team(tp: int | None) -> Iterator[Team]:
    """This process's team; torchrun's process group is given back at the end."""
    if not under_torchrun():
        yield local_team(tp)
        return
    import torch.distributed as dist

    try:
        yield torchrun_team(tp, timeout_s=120.0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _settings(
    team: Team,
    hidden: str | None,
    dtype: DType,
    min_size: str,
    max_size: str | None,
    budget: str,
    rounds: int,
    without: list[str] | None,
) -> Settings:
    gpu = team.device == "cuda"
    default_max = GPU_MAX_BYTES if gpu else CPU_MAX_BYTES
    return Settings(
        dtype=dtype,
        hidden_sizes=integers(hidden, GPU_HIDDEN_SIZES if gpu else CPU_HIDDEN_SIZES),
        min_bytes=parse_size(min_size),
        max_bytes=default_max if max_size is None else parse_size(max_size),
        budget_s=seconds(budget),
        rounds=rounds,
        without=_known(without),
    )


def _known(without: list[str] | None) -> tuple[str, ...]:
    """Checked here, before any rank starts."""
    from fusewise.backends.registry import baseline_id, select

    names = words(without)
    baselines = select(names) & {baseline_id("cuda"), baseline_id("cpu")}
    if baselines:
        raise InputError(
            f"{', '.join(sorted(baselines))} cannot be left out",
            hint="Every path is compared with torch's own all-reduce.",
        )
    return names
