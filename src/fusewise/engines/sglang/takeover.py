"""Full mode taking hold in an SGLang worker: our kernels on its group, on all its ranks or none.

Until the last step the narrow cap rules, and where a step fails it goes on ruling. SGLang looks up
``flashinfer.comm.allreduce_fusion`` when its custom operator calls it; from then on the plan says
what runs there (``engines/router.py``). Only rank 0 has read the profile, so none can vanish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusewise.engines.router import FUSED_OP, NATIVE, Router, choices_here
from fusewise.engines.seams import wrap
from fusewise.engines.sglang.bounds import BOUNDS, around_fused
from fusewise.engines.sglang.dispatch import SGLangSettings
from fusewise.engines.sglang.live import Live, log
from fusewise.errors import UnavailableError
from fusewise.operation import backend_of
from fusewise.profiles.bands import Plan
from fusewise.profiles.plan import derive
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

    @property
    def native(self) -> list[str]:
        """The backends of ours that were measured."""
        names = {backend_of(path.name) for path in self.profile.paths}
        return sorted(name for name in names if name.startswith(NATIVE))

    def plan(self, native: dict[str, Any]) -> Plan:
        """The plan over what SGLang and the kernels that were built can run."""
        gone = set(self.native) - native.keys()
        kept = tuple(s for s in self.profile.samples if backend_of(s.path) not in gone)
        return derive(
            choices_here(self.profile.model_copy(update={"samples": kept}), self.settings)
        )


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
    names = quick.broadcast("our kernels", evidence.native if evidence else [])
    tokens = tokens_at(wide_bytes, live.hidden_size, live.dtype)
    native = _built(patient, node, names, Shape(max(1, tokens), live.hidden_size, live.dtype))
    try:
        plan = _plan(quick, native, evidence)
        quick.unanimous("full mode", plan.digest)
    except Exception:
        for backend in native.values():
            backend.close()
        raise
    # Nothing is left that could fail on one rank alone.
    pattern = flashinfer.comm.AllReduceFusionPattern.kARResidualRMSNorm
    plain = live.tp_group.all_reduce
    BOUNDS.router = NarrowRouter(native, plan, plain, pattern, narrow_bytes)
    BOUNDS.max_tokens = tokens
    BOUNDS.plain_bytes = 0  # the plan's unfused paths are SGLang's other all-reduces
    wrap(flashinfer.comm, "allreduce_fusion", around_fused)
    if quick.rank == 0:
        tables = [t for t in plan.tables if t.op == FUSED_OP]
        bands = [f"hidden {t.hidden_size}: {', '.join(map(str, t.bands))}" for t in tables]
        log.info("fusewise: full mode on: %s", "; ".join(bands))


def _built(group: Group, node: Fingerprint, names: list[str], largest: Shape) -> dict[str, Any]:
    """Every kernel of ours that all ranks could build, by its backend's id.

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


def _plan(group: Group, native: dict[str, Any], evidence: Evidence | None) -> Plan:
    """Rank 0's plan on every rank.

    Raises:
        UnavailableError: rank 0 could not derive it.
    """
    fault, document = "", None
    if evidence is not None:
        try:
            document = evidence.plan(native).to_dict()
        except Exception as error:  # whatever it is, the peers must hear it
            fault = str(error)
    answer = group.broadcast("full mode's plan", [fault, document])
    if answer[0]:
        raise UnavailableError("rank 0 has no plan", got=answer[0])
    return Plan.from_dict(answer[1])
