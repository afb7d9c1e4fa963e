"""Full mode taking hold in an SGLang worker: our kernels on its group, on all its ranks or none.

Until the last step the narrow cap rules, and where a step fails it goes on ruling. SGLang looks up
``flashinfer.comm.allreduce_fusion`` when its custom operator calls it; from then on the plan says
what runs there (``engines/router.py``). Only rank 0 has read the profile, so none can vanish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusewise.engines import natives
from fusewise.engines.router import Router
from fusewise.engines.seams import wrap
from fusewise.engines.sglang.bounds import BOUNDS, around_fused
from fusewise.engines.sglang.dispatch import SGLangSettings
from fusewise.engines.sglang.live import Live, log
from fusewise.errors import UnavailableError
from fusewise.profiles.bands import Plan
from fusewise.profiles.schema import Profile
from fusewise.shape import Shape, tokens_at

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group


@dataclass(frozen=True)
class Evidence:
    """What rank 0 derives the plan from."""

    profile: Profile
    settings: SGLangSettings


class NarrowRouter(Router):
    """FlashInfer's kernel runs within the narrow cap only: the plan knows no more of what SGLang
    would run instead than the cap does, whose rule may rest on no measurement at all."""

    def _falls_to_flashinfer(self, path: str, x: Tensor) -> bool:
        return super()._falls_to_flashinfer(path, x) and (
            x.numel() * x.element_size() <= self.narrow_bytes
        )


def install(
    live: Live,
    node: Fingerprint,
    quick: Group,
    narrow_bytes: int,
    wide_bytes: int,
    evidence: Evidence | None,
) -> None:
    """Routes the fused calls of the tensor-parallel group. Collective over it.

    ``quick`` is the group with a short bound; ``evidence`` is rank 0's.

    Raises:
        FusewiseError: a rank could not; on all ranks SGLang runs with the narrow cap.
    """
    import flashinfer.comm

    from fusewise.ranks.group import Group

    patient = Group(live.tp_group.device_group)  # for what is compiled
    names = quick.broadcast("our kernels", natives.measured(evidence.profile) if evidence else [])
    tokens = tokens_at(wide_bytes, live.hidden_size, live.dtype)
    largest = Shape(max(1, tokens), live.hidden_size, live.dtype)
    native = natives.build(patient, node, names, largest)
    try:
        plan = _plan(quick, native, evidence)
        quick.unanimous("full mode", plan.digest)
    except Exception:
        natives.close(native)
        raise
    # Nothing is left that could fail on one rank alone.
    pattern = flashinfer.comm.AllReduceFusionPattern.kARResidualRMSNorm
    plain = live.tp_group.all_reduce
    BOUNDS.router = NarrowRouter(native, plan, plain, pattern, narrow_bytes)
    BOUNDS.max_tokens = tokens
    BOUNDS.plain_bytes = 0  # the plan's unfused paths are SGLang's other all-reduces
    wrap(flashinfer.comm, "allreduce_fusion", around_fused)
    if quick.rank == 0:
        log.info("fusewise: full mode on: %s", natives.bands_of(plan))


def _plan(group: Group, native: dict[str, Any], evidence: Evidence | None) -> Plan:
    """Rank 0's plan on every rank.

    Raises:
        UnavailableError: rank 0 could not derive it.
    """
    fault, document = "", None
    if evidence is not None:
        try:
            plan = natives.plan_over(native, evidence.profile, evidence.settings)
            document = plan.to_dict()
        except Exception as error:  # whatever it is, the peers must hear it
            fault = str(error)
    answer = group.broadcast("full mode's plan", [fault, document])
    if answer[0]:
        raise UnavailableError("rank 0 has no plan", got=answer[0])
    return Plan.from_dict(answer[1])
