"""``fusewise verify``: is the stack right on this node? Results only, never a time."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fusewise.commands.options import (
    FormatOption,
    HiddenOption,
    WithoutOption,
    bordered,
    check_made_for,
    dtypes,
    integers,
    words,
)
from fusewise.commands.output import check_stdout, tell, write
from fusewise.errors import InputError, VerificationError
from fusewise.ranks.teams import Team, local_team, under_torchrun
from fusewise.report.table import Column, Section
from fusewise.tune.stack_grid import FEW_TOKENS, HIDDEN_SIZES, TOKENS, StackGrid

if TYPE_CHECKING:
    from typing import Any

_COLUMNS = (
    Column("backend", "backend"),
    Column("verdict", "verdict"),
    Column("eager_cases", "eager\ncases", "", "d", "right", drop=2),
    Column("captured_cases", "captured\ncases", "", "d", "right", drop=2),
    Column("refused_cases", "refused\ncases", "", "d", "right", drop=2),
    Column("relative_error_eps", "error\neps", "", ".2f", "right", drop=1),
    Column("first_failure", "first failure"),
    Column("reason", "reason"),
)


@bordered
def verify(
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            "--tp",
            min=1,
            max=4096,
            help="Ranks of one group; they share GPUs where there are fewer. Default: one per GPU.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", "-d", help="A list.")] = "bf16,fp16,fp32",
    hidden: HiddenOption = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="Only this one; may be repeated.")
    ] = None,
    without: WithoutOption = None,
    fmt: FormatOption = "table",
) -> None:
    """Checks that every backend that can run here is right.

    Bit by bit between ranks and against float64, eager and in CUDA graphs.

    Needs two ranks and no second GPU: ranks share what there is. Exit code 0 where every backend
    that can run is right, 6 where one is wrong.
    """
    if under_torchrun():
        raise InputError("verify starts its ranks itself", hint="Run it without torchrun.")
    check_stdout()
    chosen = _chosen(words(backend), words(without))
    team = local_team(ranks, share=True)
    check_made_for(team.place.kind, chosen)
    few = team.device == "cpu" or (team.place.shared and team.world_size > 2)
    grid = StackGrid(
        dtypes=dtypes(dtype),
        hidden_sizes=integers(hidden, HIDDEN_SIZES),
        tokens=FEW_TOKENS if few else TOKENS,
        only=chosen,
    )
    tell(notes := _notes(team, grid))
    rows = _run(team, grid)
    node = team.node()
    title = f"{team.world_size} ranks on {node.device}, {node.fabric}"
    write([Section("verify", _COLUMNS, rows, title, tuple(notes))], fmt)
    failed = [row["backend"] for row in rows if row["verdict"] == "fail"]
    if failed:
        raise VerificationError(
            f"{', '.join(failed)}: wrong on this node",
            hint="Leave it out with --without in tune and serve; `fusewise doctor` says more.",
        )


def _chosen(only: tuple[str, ...], without: tuple[str, ...]) -> tuple[str, ...]:
    """Ids to verify; empty for all. Checked here, before any rank starts."""
    from fusewise.backends.registry import all_ids, select

    chosen = (select(only) or set(all_ids())) - select(without)
    if not chosen:
        raise InputError("nothing is left to verify", hint="Name fewer backends in --without.")
    return tuple(sorted(chosen)) if only or without else ()


def _notes(team: Team, grid: StackGrid) -> list[str]:
    notes = []
    if team.place.shared:
        notes.append(f"{team.world_size} ranks share GPUs: results are checked, times mean nothing")
    if grid.tokens != TOKENS:
        notes.append(f"fewer numbers of tokens than with a GPU per rank: {_listed(grid.tokens)}")
    return notes


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _run(team: Team, grid: StackGrid) -> list[dict[str, Any]]:
    """Every backend's row; one that crashes or hangs is a failure, and the others run again."""
    from fusewise.commands.progress import progress
    from fusewise.ranks.supervisor import terminated_like_interrupted
    from fusewise.tune.supervise import until_done

    with terminated_like_interrupted(), progress("verify") as listen:
        rows: list[dict[str, Any]] = until_done(
            team, "fusewise.tune.stack:verify_rank", {"settings": asdict(grid)}, grid.timeout_s,
            listen,
        )  # fmt: skip
    return rows
