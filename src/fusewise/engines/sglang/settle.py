"""The cap inside SGLang: rank 0 decides, all ranks of the tensor-parallel group agree, or none.

Runs once per process, right after SGLang has built the fusion's workspace: its groups are there,
nothing has been traced or captured, and all ranks come out of the same collective. A rank without
the plugin, with nonsense in its environment or out of time leaves all as they were, within seconds.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fusewise.engines.cap import decide_cap
from fusewise.engines.plugin import explicit_cap, mode, profile_here
from fusewise.engines.router import full_cap
from fusewise.engines.seams import missing, resolve
from fusewise.engines.sglang import live as lives
from fusewise.engines.sglang.bounds import BOUNDS
from fusewise.engines.sglang.live import Live, log
from fusewise.engines.sglang.seams import HOOKED_SEAMS, READ_SEAMS
from fusewise.errors import FusewiseError, UnavailableError
from fusewise.shape import format_size, tokens_at

if TYPE_CHECKING:
    from fusewise.engines.sglang.takeover import Evidence
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group

TIMEOUT_S = 20.0  # ranks come here within moments of each other


@dataclass(frozen=True)
class Decision:
    """What rank 0 decided, as plain data; None for both sizes: SGLang does not fuse here.

    Args:
        own_bytes: how far SGLang fuses by itself, for this model.
        cap_bytes: how far fusing never loses: what rules wherever full mode does not.
        wide_bytes: how far full mode fuses once all ranks have taken it up; None: mode ``cap``.
        why, source: for the log.
    """

    own_bytes: int | None = None
    cap_bytes: int | None = None
    wide_bytes: int | None = None
    why: str = ""
    source: str = ""


def around_workspace(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own step, then ours; never fails on our account."""
    result = original(runner, *args, **kwargs)
    try:
        if not runner.model_runner.is_draft_worker and not _done:
            _done.append(True)
            settle(runner)
    except Exception as error:
        log.warning("fusewise leaves SGLang as it is: %s", error)
    return result


_done: list[bool] = []  # the target model decides; a draft model's batches meet the same bounds


def settle(runner: Any) -> None:
    """Collective over the tensor-parallel group.

    Raises:
        FusewiseError: the ranks cannot or do not agree; on all of them SGLang is as it was.
    """
    moved = missing((*HOOKED_SEAMS, *READ_SEAMS))
    if moved:
        raise UnavailableError("this SGLang has moved a seam", got="; ".join(moved))
    live = lives.read(runner)
    if live is None:
        return
    from fusewise.ranks.agreement import fingerprint_of
    from fusewise.ranks.group import Group

    group = Group(live.tp_group.device_group, timeout_s=TIMEOUT_S)
    _compare_environments(group)
    node = fingerprint_of(group)
    decision, evidence = _decided(group, live, node)
    if decision.own_bytes is None or decision.cap_bytes is None:
        return
    if decision.cap_bytes < decision.own_bytes or decision.wide_bytes is not None:
        group.unanimous("SGLang's fusion cap", asdict(decision))
        BOUNDS.max_tokens = tokens_at(decision.cap_bytes, live.hidden_size, live.dtype)
        BOUNDS.plain_bytes = decision.cap_bytes
    if group.rank == 0:
        log.info("fusewise: fusion cap %s; %s", _change(decision, live), decision.source)
    if decision.wide_bytes is not None:
        from fusewise.engines.sglang import takeover

        try:
            takeover.install(live, node, group, decision.cap_bytes, decision.wide_bytes, evidence)
        except Exception as error:
            log.warning("fusewise: full mode is off, the cap rules: %s", error)


def _compare_environments(group: Group) -> None:
    """Each rank's variables and hooks are in order; rank 0's hold where they differ.

    Raises:
        UnavailableError: on every rank, naming the rank and the variable.
    """
    fault: Exception | None = None
    try:
        mode("sglang", os.environ)
        explicit_cap(os.environ)
        bare = [seam for seam in HOOKED_SEAMS if not hasattr(resolve(seam), "__wrapped__")]
        if bare:
            raise UnavailableError("SGLang did not apply a hook", got=str(bare[0]))
    except FusewiseError as error:
        fault = error
    failed = group.vote("the environment", fault)
    if failed:
        raise UnavailableError(f"{group}: a rank cannot take part", got=failed)
    names = ("FUSEWISE_SGLANG", "FUSEWISE_CAP", "FUSEWISE_PROFILE")
    told = group.gather("variables", [os.environ.get(name) for name in names])
    other = [
        f"rank {group.ranks[rank]} has {name}={value!r}"
        for rank, values in enumerate(told)
        for name, value, first in zip(names, values, told[0], strict=True)
        if value != first
    ]
    if other and group.rank == 0:
        log.warning("fusewise: ranks were started differently (%s); mine holds", "; ".join(other))


def _decided(group: Group, live: Live, node: Fingerprint) -> tuple[Decision, Evidence | None]:
    """Rank 0's decision on every rank, and on rank 0 what full mode derives its plan from.

    Raises:
        UnavailableError: rank 0 could not decide; on every rank, with its reason.
    """
    decision, evidence, fault = Decision(), None, ""
    if group.rank == 0:
        try:
            decision, evidence = _cap_here(live, node)
        except Exception as error:  # whatever it is, the peers must hear it
            fault = str(error)
    answer = group.broadcast("decision", [fault, asdict(decision)])
    if answer[0]:
        raise UnavailableError(answer[0])
    return Decision(**answer[1]), evidence


def _cap_here(live: Live, node: Fingerprint) -> tuple[Decision, Evidence | None]:
    """The cap for this SGLang on this node, from rank 0's environment and profiles.

    Raises:
        FusewiseError: a version, a switch or a node that cannot be judged.
    """
    from fusewise.engines.sglang.takeover import Evidence

    settings = live.settings(node)
    own = settings.cap_bytes(live.hidden_size)
    if own is None:
        return Decision(), None
    found = profile_here(node, live.dtype, log)
    decided = decide_cap(
        found.profile,
        settings,
        explicit=explicit_cap(os.environ),
        profile_level=found.level,
        hidden_size=live.hidden_size,
    )
    assert decided.cap_bytes is not None  # there is a threshold, so there is a cap
    cap = min(own, decided.cap_bytes)
    source = found.source(decided)
    wide = None
    if mode("sglang", os.environ) == "full" and decided.origin != "explicit":
        wide = full_cap(found.profile, settings, live.hidden_size) if live.one_stream else None
        if not live.one_stream:
            source += "; full needs all calls on one stream, --enable-pdmux has two"
        elif wide is None:
            source += "; full needs a profile of this node with a native kernel in it"
    profile = found.profile
    evidence = None if wide is None or profile is None else Evidence(profile, settings)
    return Decision(own, cap, wide and max(wide, cap), decided.why, source), evidence


def _change(decision: Decision, live: Live) -> str:
    own, cap, wide = decision.own_bytes or 0, decision.cap_bytes or 0, decision.wide_bytes
    told = "cap" if wide is None else f"full, {format_size(wide)} once its kernels are up"
    if cap == own:
        return f"stays {format_size(own)} ({told}): {decision.why}"
    before, after = (tokens_at(size, live.hidden_size, live.dtype) for size in (own, cap))
    new = format_size(cap) if after else "nothing fused"
    return (
        f"{format_size(own)} -> {new}, {before} -> {after} tokens of {live.hidden_size} ({told}): "
        f"{decision.why}"
    )
