"""Full mode's kernels of ours: built on an engine's group by all ranks, and the plan over them.

Each engine's ``takeover.py`` says when; what then happens to a call is ``router.py``'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fusewise.engines.base import EngineSettings
from fusewise.engines.router import FUSED_OP, NATIVE, choices_here
from fusewise.errors import UnavailableError
from fusewise.operation import backend_of
from fusewise.profiles.bands import Plan
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile
from fusewise.shape import Shape

if TYPE_CHECKING:
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group

log = logging.getLogger("fusewise.engines")


def measured(profile: Profile) -> list[str]:
    """The backends of ours that a profile has times of."""
    names = {backend_of(path.name) for path in profile.paths}
    return sorted(name for name in names if name.startswith(NATIVE))


def build(group: Group, node: Fingerprint, names: Iterable[str], largest: Shape) -> dict[str, Any]:
    """Every kernel that all ranks could build, by its backend's id. Collective.

    Raises:
        UnavailableError: none; so on all ranks.
    """
    from fusewise.backends.steps import build_backend

    built: dict[str, Any] = {}
    failures = []
    for name in names:
        backend, failed = build_backend(name, group, node, largest)
        if backend is None:
            failures.append(f"{name}: {failed}")
        else:
            built[name] = backend
    if not built:
        raise UnavailableError("no native kernel could be built", got="; ".join(failures))
    return built


def close(built: Mapping[str, Any]) -> None:
    """Closes them all; one that cannot be closed is logged, for the engine goes on."""
    for name, backend in built.items():
        try:
            backend.close()
        except Exception as error:
            log.warning("fusewise: %s could not be closed: %s", name, error)


def plan_over(built: Collection[str], profile: Profile, settings: EngineSettings) -> Plan:
    """The plan over what this engine and the kernels that were built can run."""
    gone = set(measured(profile)) - set(built)
    kept = tuple(s for s in profile.samples if backend_of(s.path) not in gone)
    return derive(choices_here(profile.model_copy(update={"samples": kept}), settings))


def bands_of(plan: Plan) -> str:
    """The fused operation's decisions in one line, for the log."""
    return "; ".join(
        f"hidden {table.hidden_size}: {', '.join(map(str, table.bands))}"
        for table in plan.tables
        if table.op == FUSED_OP
    )
