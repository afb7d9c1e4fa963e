"""``tune`` and ``bench``: the commands that start ranks and measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fusewise.commands.after_tune import kept_so_far, picture_of, unreached, what_now
from fusewise.commands.measuring import alone
from fusewise.commands.options import (
    DTypeOption,
    FormatOption,
    HiddenOption,
    TpOption,
    WithoutOption,
    bordered,
    dtype_of,
    dtypes,
    integers,
    seconds,
    words,
)
from fusewise.commands.output import tell, write, write_picture
from fusewise.errors import FusewiseError, InputError
from fusewise.profiles import history, store
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile, profile_file_name
from fusewise.ranks.teams import Team, local_team, torchrun_team, under_torchrun
from fusewise.report.bench_table import bench as bench_sections
from fusewise.report.bench_table import header
from fusewise.report.records import tables
from fusewise.report.table import Format
from fusewise.shape import DType, parse_size
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
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew; the old profile goes to the history.")
    ] = False,
    into: Annotated[
        Path | None, typer.Option("--into", help="Folder to keep the profile in.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the picture: .svg, .png.")] = None,
    fmt: FormatOption = "table",
) -> None:
    """Measure this node, write its profile, print what was decided.

    Starts one rank per GPU (two CPU ranks without GPUs), or joins torchrun's:
    torchrun --nproc-per-node 8 -m fusewise tune. A provider that fails, crashes or hangs is left
    out with its reason. A profile of this very node is extended: what it lacks is measured first,
    and what it had is kept.
    """
    # Before minutes are spent: whether their result can be written.
    folder = into or store.user_dir()
    history.private_directory(folder)
    kinds = dtypes(dtype)
    pictures = {one: picture_of(plot, one, kinds) for one in kinds} if plot is not None else {}
    with _team(tp) as team:
        asked = [
            _settings(team, hidden, one, min_size, max_size, budget, rounds, without)
            for one in kinds
        ]
        node = team.node()
        for one in kinds:
            history.check_target(folder / profile_file_name(node, one))
        made: list[Profile] = []
        missed: list[str] = []
        with alone():
            for settings in asked:
                with kept_so_far(made):
                    profile = _tuned(team, settings, folder, fresh, missed, fmt)
                if profile is not None:
                    made.append(profile)
        if not made or (team.world is not None and team.world.rank):
            return
        parts = [part for one in made for part in tables(one, derive(one))]
        write(parts, fmt, main="measurements")
        for one, picture in pictures.items():
            found = next(profile for profile in made if profile.dtype == one)
            write_picture(found, derive(found), picture)
        tell([*missed, *what_now(made[0], into)])


def _tuned(
    team: Team, settings: Settings, folder: Path, fresh: bool, missed: list[str], fmt: Format
) -> Profile | None:
    """Measures one dtype and keeps it at once: a later one's failure must not lose it, nor its own
    when it is written: then its tables are printed all the same.

    Adds to ``missed`` what the budget did not reach, in words.
    """
    from fusewise.commands.progress import progress
    from fusewise.ranks.supervisor import terminated_like_interrupted
    from fusewise.tune.supervise import tune_everywhere

    node = team.node()
    known = None if fresh else store.kept_in(folder, node, settings.dtype)
    with terminated_like_interrupted(), progress(f"tune {settings.dtype}") as listen:

        def heard(event: dict[str, Any]) -> None:
            if event["kind"] == "unreached":
                missed.extend(unreached(event, settings))
            listen(event)

        measured = tune_everywhere(team, settings, heard, known)
    if measured is None:
        return None
    try:
        if fresh:
            path, profile = store.save(measured, folder), measured
        else:
            path, profile = store.extend(measured, folder)
    except (FusewiseError, OSError, NotImplementedError):  # the last: no locks on that file system
        write(tables(measured, derive(measured)), fmt, main="measurements")
        raise
    if team.world is None or team.world.rank == 0:
        extends = profile.provenance.extends
        more = f", extending what was measured {extends}" if extends else ""
        tell([f"wrote {path}{more}"])
    return profile


@bordered
def bench(
    hidden: HiddenOption = None,
    dtype: DTypeOption = None,
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
        one = dtype_of(dtype, None)
        settings = _settings(team, hidden, one, min_size, max_size, "24h", rounds, without)
        with alone(), terminated_like_interrupted(), progress("bench") as listen:
            found = bench_team(team, settings, listen)
        if found is not None:
            wrong = {(s.op, s.path, s.num_tokens, s.hidden_size): count for s, count in found}
            samples, head = [sample for sample, _ in found], header(settings, team.node())
            write(bench_sections(samples, one, team.world_size, wrong, head), fmt)


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
    from fusewise.backends.registry import baselines, select

    names = words(without)
    needed = select(names) & baselines()
    if needed:
        raise InputError(
            f"{', '.join(sorted(needed))} cannot be left out",
            hint="Every path is compared with torch's own all-reduce.",
        )
    return names
