"""Full mode taking hold in a vLLM worker: our kernels on vLLM's group, on all its ranks or none.

Runs once per engine, right after vLLM has built the tensor-parallel group's communicator, and only
where the ranks have agreed on a config that is marked for it. Until the last step the narrow cap
rules, and where a step fails it goes on ruling. What then happens to a call is ``router.py``'s
business.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusewise.engines import natives
from fusewise.engines.router import Router
from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.engines.vllm.engine import settings_on
from fusewise.engines.vllm.mark import Mark
from fusewise.engines.vllm.seams import FUSED_SEAM, missing, wrap
from fusewise.engines.vllm.settle import TIMEOUT_S
from fusewise.engines.vllm.tables import known_version
from fusewise.errors import UnavailableError
from fusewise.node import torch_multicast
from fusewise.profiles.bands import Plan
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import find_profile
from fusewise.shape import DType, Shape, parse_dtype, tokens_at

if TYPE_CHECKING:
    from fusewise.node import Fingerprint

log = logging.getLogger("vllm.plugins.fusewise")

_current: list[Router] = []  # of the engine that runs in this process; at most one


@dataclass(frozen=True)
class Side:
    """What one rank brings: its view of the node, which must be every rank's."""

    settings: VllmSettings
    profile: Profile
    where: str
    comm: Any  # flashinfer.comm

    @property
    def proposal(self) -> list[str]:
        """What ranks must have in common."""
        return [self.where, derive(self.profile).digest, str(self.settings)]


def release() -> None:
    """A new engine begins in this process: what ran before is not its router."""
    _current.clear()


def install(vllm_communicator: Any, config: Any, mark: Mark) -> None:
    """In a worker whose config says ``full``: routes the tensor-parallel group's calls.

    Collective over the group: each of its ranks builds vLLM's communicator, hence this, at once.

    Raises:
        FusewiseError: a rank could not, or was of another opinion; on all ranks vLLM runs with the
            narrow cap.
    """
    if mark.mode != "full":
        return
    from fusewise.ranks.agreement import fingerprint_of
    from fusewise.ranks.group import Group

    process_group = vllm_communicator.device_group
    quick = Group(process_group, timeout_s=TIMEOUT_S)
    node = fingerprint_of(quick)
    side, fault = None, None
    try:
        side = _side(node, config)
    except Exception as error:  # whatever it is, the peers must hear it
        fault = error
    quick.unanimous("full mode", side.proposal if side else None, fault)
    assert side is not None  # it had no fault
    group = Group(process_group)  # a step of building takes longer, and so may a peer's kernel
    names, largest = natives.measured(side.profile), _largest(mark, config, side.profile.dtype)
    native = natives.build(group, node, names, largest)
    try:
        plan = natives.plan_over(native, side.profile, side.settings)
        quick.unanimous("full mode's plan", plan.digest)
    except Exception:
        natives.close(native)
        raise
    # Nothing is left that could fail on one rank alone.
    _take_over(vllm_communicator, config, mark, side, native, plan)
    if group.rank == 0:
        log.info("fusewise: full mode on: %s", natives.bands_of(plan))


def _take_over(
    vllm_communicator: Any,
    config: Any,
    mark: Mark,
    side: Side,
    native: dict[str, Any],
    plan: Plan,
) -> None:
    destroy = vllm_communicator.destroy
    if mark.wide_mb is not None:
        marks.set_fusion_again(config, mark, mark.wide_mb)
    _silence_plain_flashinfer(vllm_communicator, side.settings)
    pattern = side.comm.AllReduceFusionPattern.kARResidualRMSNorm
    router = Router(native, plan, vllm_communicator.all_reduce, pattern, mark.cap_bytes)
    vllm_communicator.all_reduce = router.all_reduce

    def destroy_ours_too() -> None:
        if router in _current:
            _current.remove(router)
        natives.close(native)
        destroy()

    vllm_communicator.destroy = destroy_ours_too
    wrap(side.comm, "allreduce_fusion", _routed)
    _current.append(router)


def _routed(original: Any, *args: Any, **kwargs: Any) -> Any:
    """``allreduce_fusion``, by the router of the engine that runs now; without one, as it was."""
    if not _current:
        return original(*args, **kwargs)
    return _current[0].fused(original, *args, **kwargs)


def _largest(mark: Mark, config: Any, dtype: DType) -> Shape:
    """The largest message that may reach our kernels."""
    hidden_size = config.model_config.get_hidden_size()
    size = max(mark.cap_bytes, marks.in_bytes(mark.wide_mb or 0))
    return Shape(max(1, tokens_at(size, hidden_size, dtype)), hidden_size, dtype)


def _side(node: Fingerprint, config: Any) -> Side:
    """This worker's vLLM, its node's profile and FlashInfer.

    Raises:
        FusewiseError: a seam has moved, there is no profile any more, or a switch cannot be read.
    """
    moved = missing([FUSED_SEAM])
    if moved:
        raise UnavailableError("full mode is off: this vLLM has moved a seam", got=moved[0])
    import flashinfer.comm

    dtype = parse_dtype(str(config.model_config.dtype))
    flags = {
        "custom_all_reduce": not config.parallel_config.disable_custom_all_reduce,
        "multicast": torch_multicast() and node.kind != "shared",  # as where the cap was decided
    }
    version, _ = known_version(importlib.metadata.version("vllm"))
    settings = settings_on(version, node, dtype, os.environ, flags)
    found = find_profile(node, dtype)
    if found.profile is None:
        raise UnavailableError("full mode is off: the profile has gone")
    return Side(settings, found.profile, found.where, flashinfer.comm)


def _silence_plain_flashinfer(vllm_communicator: Any, settings: VllmSettings) -> None:
    """The plan's unfused paths are vLLM's other all-reduces: FlashInfer's must not come first.

    It stays where vLLM holds a size of its own for it, as on some Blackwell nodes.
    """
    plain = getattr(vllm_communicator, "fi_ar_comm", None)
    own = settings.displaced_choice(settings.cap_bytes() or 0)
    if plain is not None and not own.startswith("flashinfer"):
        plain.disabled = True
