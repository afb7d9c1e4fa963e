"""A decode run as its caller sees it: what the ranks measured, however they ended.

Imports no torch itself. Sizes come one by one; what was measured before a failure, an interruption
or a size too large for memory is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fusewise.decode.arms import Arm
from fusewise.decode.config import DecodeSettings, Phase
from fusewise.decode.results import Row
from fusewise.errors import RankError
from fusewise.ranks.nursery import Nursery
from fusewise.ranks.supervisor import run_attempt, terminated_like_interrupted
from fusewise.ranks.teams import Team

# Seconds of a core to import, once for all ranks instead of once for each.
_COMPILES = ("torch._inductor.compile_fx", "transformers.modeling_utils")


@dataclass
class Attempt:
    """Whole sizes only: the rows of every arm, what the pass said, and what ended it early."""

    rows: list[Row] = field(default_factory=list)
    sites: dict[str, list[str]] = field(default_factory=dict)
    ended_by: RankError | KeyboardInterrupt | None = None

    def unreached(self, settings: DecodeSettings) -> list[tuple[Phase, int]]:
        """The sizes that were asked for and not measured, in the order asked."""
        measured = {(row["phase"], row["tokens"]) for row in self.rows}
        return [size for size in settings.sizes if size not in measured]


def run_decode(
    team: Team, settings: DecodeSettings, arms: Sequence[Arm], listen: Callable[[Any], None]
) -> Attempt:
    """Runs all sizes on all ranks of the team; raises nothing that a rank or a signal did.

    Args:
        listen: called with every progress event of rank 0.
    """
    attempt = Attempt()

    def told(rank: int, event: dict[str, Any]) -> None:
        if rank:
            return
        if event["kind"] == "progress":
            listen(event)
        elif event["kind"] == "measured":
            attempt.rows += event["rows"]
            attempt.sites = event["sites"]

    request = {
        "settings": asdict(settings),
        "plans": {arm.name: arm.plan.to_dict() for arm in arms},
    }
    job = "fusewise.decode.rank:decode_rank"
    # Not on GPUs: what compiles may ask CUDA while it loads, which no fork survives.
    modules = _COMPILES if team.device == "cpu" else ()
    try:
        with terminated_like_interrupted(), Nursery(*modules) as nursery:
            outcome = run_attempt(team, job, request, told, nursery, settings.timeout_s)
    except (RankError, KeyboardInterrupt) as error:
        attempt.ended_by = error
        return attempt
    if outcome.failure is not None:
        attempt.ended_by = RankError(f"decode stopped: {outcome.failure}")
        attempt.ended_by.exit_code = outcome.failure.code
    return attempt
