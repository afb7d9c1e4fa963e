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

from fusewise.engines.router import FUSED_OP, NATIVE, Router, choices_here
from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.engines.vllm.engine import settings_on
from fusewise.engines.vllm.mark import Mark
from fusewise.engines.vllm.seams import FUSED_SEAM, missing, wrap
from fusewise.engines.vllm.settle import TIMEOUT_S
from fusewise.engines.vllm.tables import known_version
from fusewise.errors import UnavailableError
from fusewise.node import torch_multicast
from fusewise.operation import backend_of
from fusewise.profiles.bands import Plan
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import find_profile
from fusewise.shape import Shape, parse_dtype

if TYPE_CHECKING:
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group

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
    native = _native(group, node, side.profile, config, _largest(mark))
    try:
        plan = _plan(native, side)
        quick.unanimous("full mode's plan", plan.digest)
    except Exception:
        _close(native)
        raise
    # Nothing is left that could fail on one rank alone.
    _take_over(vllm_communicator, config, mark, side, native, plan)
    if group.rank == 0:
        log.info("fusewise: full mode on: %s", "; ".join(_bands_text(plan)))


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
        _close(native)
        destroy()

    vllm_communicator.destroy = destroy_ours_too
    wrap(side.comm, "allreduce_fusion", _routed)
    _current.append(router)


def _routed(original: Any, *args: Any, **kwargs: Any) -> Any:
    """``allreduce_fusion``, by the router of the engine that runs now; without one, as it was."""
    if not _current:
        return original(*args, **kwargs)
    return _current[0].fused(original, *args, **kwargs)


def _close(native: dict[str, Any]) -> None:
    for path, backend in native.items():
        try:
            backend.close()
        except Exception as error:  # vLLM goes on closing, whatever ours makes of it
            log.warning("fusewise: %s could not be closed: %s", path, error)


def _largest(mark: Mark) -> int:
    return max(mark.cap_bytes, marks.in_bytes(mark.wide_mb or 0))


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


def _native(
    group: Group, node: Fingerprint, profile: Profile, config: Any, cap_bytes: int
) -> dict[str, Any]:
    """Every native kernel the profile names and all ranks could build, by its backend's id.

    Raises:
        UnavailableError: none; so on all ranks.
    """
    from fusewise.backends.steps import build_backend

    hidden_size = config.model_config.get_hidden_size()
    row_bytes = Shape(1, hidden_size, profile.dtype).row_bytes
    largest = Shape(max(1, cap_bytes // row_bytes), hidden_size, profile.dtype)
    built: dict[str, Any] = {}
    failures = []
    for name in sorted({backend_of(p.name) for p in profile.paths if p.name.startswith(NATIVE)}):
        backend, failed = build_backend(name, group, node, largest)
        if backend is None:
            failures.append(f"{name}: {failed}")
        else:
            built[name] = backend
    if not built:
        raise UnavailableError(
            "full mode is off: no native kernel could be built", got="; ".join(failures)
        )
    return built


def _plan(native: dict[str, Any], side: Side) -> Plan:
    """The plan over what this vLLM and the kernels that were built can run."""
    profile = side.profile
    gone = {name for p in profile.paths if (name := backend_of(p.name)).startswith(NATIVE)}
    gone -= native.keys()
    kept = tuple(s for s in profile.samples if backend_of(s.path) not in gone)
    return derive(choices_here(profile.model_copy(update={"samples": kept}), side.settings))


def _bands_text(plan: Plan) -> list[str]:
    return [
        f"hidden {table.hidden_size}: {', '.join(map(str, table.bands))}"
        for table in plan.tables
        if table.op == FUSED_OP
    ]


def _silence_plain_flashinfer(vllm_communicator: Any, settings: VllmSettings) -> None:
    """The plan's unfused paths are vLLM's other all-reduces: FlashInfer's must not come first.

    It stays where vLLM holds a size of its own for it, as on some Blackwell nodes.
    """
    plain = getattr(vllm_communicator, "fi_ar_comm", None)
    own = settings.displaced_choice(settings.cap_bytes() or 0)
    if plain is not None and not own.startswith("flashinfer"):
        plain.disabled = True
