"""What all ranks of a group settle before the first message: fingerprint and plan.

Every step is a vote or a comparison over the control channel, so a rank that fails makes all ranks
fail alike, at once and by name. No data tensor is touched here.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
import torch.distributed as dist

from fusewise.errors import FusewiseError, UnavailableError
from fusewise.node import Fingerprint, probe
from fusewise.profiles import store
from fusewise.profiles.bands import Plan, default_plan
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile
from fusewise.ranks.place import PLACES, SHARED_SWITCH, sharing
from fusewise.shape import DType

if TYPE_CHECKING:
    from fusewise.ranks.group import Group

log = logging.getLogger("fusewise")


def fingerprint_of(group: Group) -> Fingerprint:
    """This group's fingerprint, the same on all its ranks.

    Raises:
        DisagreementError: ranks run on different GPUs or different versions.
        UnavailableError: ranks share a GPU, and their process group is NCCL's.
    """
    told = group.gather("hosts", [_host(), _gpu(group)])
    shared = sharing(gpu for _, gpu in told)
    if shared and "nccl" in str(dist.get_backend(group.process_group)):
        raise UnavailableError(
            f"{group}: ranks share a GPU",
            expected=f"a process group with the {PLACES['shared'].process_group} backend",
            got="nccl, which takes one rank per GPU",
            hint=f"Set {SHARED_SWITCH}=1 and call init_process_group('gloo').",
        )
    hosts = len({host for host, _ in told})
    node = probe(group.world_size, nodes=hosts, device_type=group.device.type, shared=bool(shared))
    group.agree("fingerprint", node.model_dump(mode="json"))
    return node


def _host() -> str:
    """One name per running kernel: containers on one host share shared memory or say so."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text().strip() if boot.exists() else "")


def _gpu(group: Group) -> str | None:
    """One name per GPU in the world; None for a CPU rank."""
    if group.device.type == "cpu":
        return None
    return str(torch.cuda.get_device_properties(group.device).uuid)


def agreed_plans(
    group: Group,
    node: Fingerprint,
    argument: Profile | Plan | str | os.PathLike[str] | None,
    baseline: str,
    without: Collection[str] = (),
) -> tuple[dict[DType, Plan], str]:
    """Every dtype's plan: rank 0 decides, all compare what they were given and what they got.

    Backends in ``without`` are taken out of the profile before the plan is derived, so that the
    best of the others runs; a ``Plan`` is taken as it is. ``baseline`` is the path that runs where
    nothing was decided.
    """
    if isinstance(argument, Plan):
        group.agree("plan passed as argument", argument.digest)
        return _with_defaults(baseline, [argument]), argument.source
    error: FusewiseError | None = None
    given: str | None = None
    found: list[store.Resolution] = []
    try:
        if argument is not None and not isinstance(argument, Profile):
            argument = store.load(argument)
        given = derive(argument).digest if argument is not None else None
        dtypes = [argument.dtype] if argument is not None else list(get_args(DType))
        if argument is not None or group.rank == 0:
            found = [store.find_profile(node, dtype, argument=argument) for dtype in dtypes]
    except FusewiseError as fault:
        error = fault
    failed = group.vote("profile", error)
    if error is not None:
        raise error
    if failed:
        raise UnavailableError(f"{group}: a peer could not read its profile", got=failed)
    group.agree("profile passed as argument", given)
    for note in dict.fromkeys(note for resolution in found for note in resolution.notes):
        log.warning("%s", note)
    if found and argument is None and not any(resolution.profile for resolution in found):
        _say_once(
            f"no profile applies to {node.world_size} ranks on {node.device}: {baseline} runs at "
            f"every size. {store.TUNE_HINT}"
        )
    profiles = [resolution.profile.without(without) for resolution in found if resolution.profile]
    derived = [derive(profile) for profile in profiles if profile is not None]
    plans = _with_defaults(baseline, derived)
    documents = group.broadcast("plan", {dtype: plan.to_dict() for dtype, plan in plans.items()})
    plans = {dtype: Plan.from_dict(document) for dtype, document in documents.items()}
    group.agree("plan digest", [plan.digest for plan in plans.values()])
    return plans, found[0].where if found else "rank 0's profile"


@functools.cache
def _say_once(message: str) -> None:
    """However many groups a process makes."""
    log.warning("%s", message)


def _with_defaults(baseline: str, plans: list[Plan]) -> dict[DType, Plan]:
    """One plan per dtype: those given, the baseline for the others."""
    defaults = {dtype: default_plan(dtype, baseline) for dtype in get_args(DType)}
    return defaults | {plan.dtype: plan for plan in plans}
