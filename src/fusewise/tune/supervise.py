"""The tune as the caller sees it: attempts in children until every bad backend is left out.

Imports no torch itself. Nothing is written here; a profile is returned only when all ranks ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fusewise.backends.registry import baselines
from fusewise.errors import FusewiseError, RankError, UnavailableError
from fusewise.profiles.schema import Profile, Sample, parse_profile
from fusewise.ranks.nursery import Nursery
from fusewise.ranks.supervisor import Failure, run_attempt
from fusewise.tune.settings import Settings

if TYPE_CHECKING:
    from fusewise.ranks.teams import Team

Listener = Callable[[dict[str, Any]], None]

# A signal from outside (the user, the out-of-memory killer, a scheduler) is no provider's fault.
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
_SLACK_S = 900.0  # starting ranks and building kernels, beyond the measuring budget


def tune_team(
    team: Team, settings: Settings, listen: Listener, known: Profile | None = None
) -> Profile | None:
    """Measures one team; the profile where this process leads, None elsewhere.

    Points that ``known`` has, if it is of this node, are measured last; they are not in the result
    unless they were.

    A backend that crashes, spins or fails on any rank is excluded with its reason and the team
    starts again without it.

    Raises:
        RankError: ranks failed for a reason that is no backend's.
    """
    request = {"settings": asdict(settings), "known": known.to_json() if known else None}
    document = until_done(team, "fusewise.tune.job:tune_rank", request, settings.timeout_s, listen)
    return parse_profile(document, "the measured profile") if team.leads else None


def bench_team(team: Team, settings: Settings, listen: Listener) -> list[tuple[Sample, int]] | None:
    """Every path at every size with its wrong elements; None where this process does not lead.

    Raises:
        RankError: ranks failed for a reason that is no backend's.
    """
    request = {"settings": asdict(settings)}
    rows = until_done(team, "fusewise.tune.bench:bench_rank", request, settings.timeout_s, listen)
    return [(Sample(**sample), wrong) for sample, wrong in rows] if team.leads else None


def until_done(
    team: Team, job: str, request: dict[str, Any], timeout_s: float, listen: Listener
) -> Any:
    """Rank 0's result (None where another process has it) of the attempt that came through.

    A backend whose code ended an attempt is in the next one's ``request["excluded"]``, with why.

    Raises:
        RankError: ranks failed for a reason that is no backend's.
    """
    excluded: dict[str, str] = {}
    with Nursery() as nursery:
        while True:
            outcome = run_attempt(
                team, job, request | {"excluded": excluded},
                lambda rank, event: _forward(rank, event, listen), nursery, timeout_s,
            )  # fmt: skip
            if outcome.failure is None:
                return outcome.results.get(0)
            culprit = _culprit(outcome.failure)
            excluded[culprit] = str(outcome.failure)
            listen({"kind": "excluded", "backend": culprit, "reason": str(outcome.failure)})


def _forward(rank: int, event: dict[str, Any], listen: Listener) -> None:
    if rank == 0 and event["kind"] in ("progress", "excluded", "ready", "unreached"):
        listen(event)


def _culprit(failure: Failure) -> str:
    """The backend to leave out.

    Raises:
        RankError: it was nobody's, or torch's own all-reduce, without which nothing compares.
    """
    outside = any(failure.reason.endswith(name) for name in _FROM_OUTSIDE)
    if failure.backend is None or outside or failure.backend in baselines():
        error = RankError(f"stopped: {failure}", hint="Nothing was written; run it again.")
        error.exit_code = failure.code
        raise error
    return failure.backend


def tune_everywhere(
    team: Team, settings: Settings, listen: Listener, known: Profile | None = None
) -> Profile | None:
    """Like ``tune_team`` on several torchrun nodes: one measurement per distinct fabric.

    Teams with equal fingerprints share the measurement of the first of them; every leader gets
    the profile of its own fabric.

    Raises:
        RankError: this team, or the one that measured for it, failed.
    """
    if team.world is None:
        return tune_team(team, settings, listen, known)
    mine = team.node().model_dump_json()
    marks = team.world.gather("fabric", mine)
    measures = marks.index(mine) // team.world_size == team.world.rank // team.world_size
    profile, failure = None, None
    if measures:
        try:
            profile = tune_team(team, settings, listen, known)
        except FusewiseError as error:
            failure = error
    team.world.timeout_s = settings.budget_s + _SLACK_S
    told = [profile.to_json() if profile else None, str(failure) if failure else None]
    results = team.world.gather("profiles", told)
    if failure is not None:
        raise failure
    document, trouble = results[marks.index(mine)]
    if trouble:
        raise RankError("the team that measured this fabric failed", got=trouble)
    if document is None:
        raise UnavailableError("the team that measured this fabric returned no profile")
    return parse_profile(document, "the measured profile") if team.leads else None
