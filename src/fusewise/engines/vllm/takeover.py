"""Full mode taking hold in a vLLM worker: our kernels on vLLM's group, agreed on by all its ranks.

Runs once, right after vLLM has built the tensor-parallel group's communicator, and only where the
config carries the mark of full mode. What then happens to a call is ``router.py``'s business.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from typing import TYPE_CHECKING, Any

from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.engines.vllm.engine import settings_on
from fusewise.engines.vllm.router import FUSED_OP, NATIVE, Router, choices_here
from fusewise.engines.vllm.seams import FUSED_SEAM, MARK, missing, wrap
from fusewise.errors import UnavailableError
from fusewise.profiles.bands import Plan
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import find_profile
from fusewise.shape import Shape, parse_dtype

if TYPE_CHECKING:
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group

log = logging.getLogger("vllm.plugins.fusewise")


def install(vllm_communicator: Any, config: Any) -> None:
    """In a worker whose config says ``full``: routes the tensor-parallel group's calls.

    Collective over the group: each of its ranks builds vLLM's communicator, hence this, at once.

    Raises:
        FusewiseError: nothing could be built, or ranks disagree; vLLM is as it was, on all ranks.
    """
    mark = getattr(config.compilation_config.pass_config, MARK, None)
    name = getattr(vllm_communicator, "unique_name", "")
    if mark is None or mark["mode"] != "full" or name.split(":")[0] != "tp":
        return
    moved = missing([FUSED_SEAM])
    if moved:
        raise UnavailableError("full mode is off: this vLLM has moved a seam", got=moved[0])
    import flashinfer.comm

    from fusewise.ranks.agreement import fingerprint_of
    from fusewise.ranks.group import Group

    pattern = flashinfer.comm.AllReduceFusionPattern.kARResidualRMSNorm
    group = Group(vllm_communicator.device_group)
    node = fingerprint_of(group)
    settings, profile = _here(node, config)
    native = _native(group, node, profile, config, int(mark["cap_mb"] * 2**20))
    plan = _agreed_plan(group, native, profile, settings)
    # The ranks have just agreed; what follows cannot fail on one of them alone.
    _silence_plain_flashinfer(vllm_communicator, settings)
    router = Router(native, plan, vllm_communicator.all_reduce, pattern)
    vllm_communicator.all_reduce = router.all_reduce
    wrap(flashinfer.comm, "allreduce_fusion", router.fused)
    if group.rank == 0:
        log.info("fusewise: full mode on: %s", "; ".join(_bands_text(plan)))


def _here(node: Fingerprint, config: Any) -> tuple[VllmSettings, Profile]:
    """This worker's vLLM and its node's profile.

    Raises:
        FusewiseError: there is no profile any more, or a switch cannot be read.
    """
    dtype = parse_dtype(str(config.model_config.dtype))
    flags = {"custom_all_reduce": not config.parallel_config.disable_custom_all_reduce}
    version = importlib.metadata.version("vllm")
    settings = settings_on(version, node, dtype, os.environ, flags)
    profile = find_profile(node, dtype).profile
    if profile is None:
        raise UnavailableError("full mode is off: the profile has gone")
    return settings, profile


def _native(
    group: Group, node: Fingerprint, profile: Profile, config: Any, cap_bytes: int
) -> dict[str, Any]:
    """Every native kernel the profile names and all ranks could build, by path.

    Raises:
        UnavailableError: none; so on all ranks.
    """
    from fusewise.backends.steps import build_backend

    hidden_size = config.model_config.get_hidden_size()
    row_bytes = Shape(1, hidden_size, profile.dtype).row_bytes
    largest = Shape(max(1, cap_bytes // row_bytes), hidden_size, profile.dtype)
    built: dict[str, Any] = {}
    failures = []
    for path in sorted(p.name for p in profile.paths if p.name.startswith(NATIVE)):
        backend, failed = build_backend(path, group, node, largest)
        if backend is None:
            failures.append(f"{path}: {failed}")
        else:
            built[path] = backend
    if not built:
        raise UnavailableError(
            "full mode is off: no native kernel could be built", got="; ".join(failures)
        )
    return built


def _agreed_plan(
    group: Group, native: dict[str, Any], profile: Profile, settings: VllmSettings
) -> Plan:
    """The plan over what this vLLM and the kernels that were built can run.

    Raises:
        DisagreementError: ranks derived different plans; their kernels are closed again.
    """
    kept = tuple(s for s in profile.samples if s.path in native or not s.path.startswith(NATIVE))
    plan = derive(choices_here(profile.model_copy(update={"samples": kept}), settings))
    try:
        group.agree("plan inside vLLM", plan.digest)
    except Exception:
        for backend in native.values():
            backend.close()
        raise
    return plan


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
