"""Full mode inside vLLM: its fused op and its plain all-reduce run our plan, shape by shape.

vLLM looks up ``flashinfer.comm.allreduce_fusion`` when it calls it, and writes its results in
place; both are kept. At each size the plan names a native kernel (ours runs), a FlashInfer kernel
(the original call runs, with vLLM's own workspace) or an unfused path (vLLM's own all-reduce runs,
then our norm). Patterns with quantisation go to the original. All ranks choose alike, because the
communicator has compared the plan's digest on all of them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusewise.bands import Plan, Table
from fusewise.errors import UnavailableError
from fusewise.integrations.vllm_node import settings_here
from fusewise.integrations.vllm_seams import FUSED_SEAM, MARK, missing, wrap
from fusewise.plan import derive
from fusewise.profile import UNFUSED_SUFFIX, Profile, Sample
from fusewise.shape import Op, Shape, parse_dtype
from fusewise.thresholds import VllmSettings, displaced_choice, engine_cap

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.communicator import Communicator

log = logging.getLogger("vllm.plugins.fusewise")

_OP: Op = "all_reduce_rms_norm"
_NATIVE, _FLASHINFER = "native.", "flashinfer."
# FlashInfer's one-shot kernels end at 64 MiB over the world size (vLLM's comment beside
# _FI_ALLREDUCE_ONE_SHOT_MAX_SIZES_MB); vLLM sizes FlashInfer's workspace by the cap.
_WORKSPACE_BYTES = 64 * 2**20
_QUANTISED = {"output", "quant_out", "scale_out"}  # arguments of patterns we do not cover


def choices_here(profile: Profile, settings: VllmSettings) -> Profile:
    """The profile without paths this vLLM cannot run: other all-reduces than its own, per size.

    Its baseline is what vLLM fuses with, so that a tie keeps FlashInfer's kernel.
    """
    kept = tuple(s for s in profile.samples if _runs_here(s, profile, settings))
    return profile.model_copy(update={"samples": kept, "baseline": "flashinfer.one_shot"})


def _runs_here(sample: Sample, profile: Profile, settings: VllmSettings) -> bool:
    if _is_fused(sample.path) or sample.path.startswith(_NATIVE):
        return True
    size = Shape(sample.num_tokens, sample.hidden_size, profile.dtype).message_bytes
    own = displaced_choice(settings, size)
    return sample.path in (own, own.removesuffix(UNFUSED_SUFFIX))


def _is_fused(path: str) -> bool:
    return path.startswith((_NATIVE, _FLASHINFER)) and not path.endswith(UNFUSED_SUFFIX)


def full_cap(
    profile: Profile | None, settings: VllmSettings, hidden_size: int | None
) -> int | None:
    """The largest size at which the plan fuses, bounded by what FlashInfer's workspace holds.

    None without a measured native kernel: then full mode has nothing to offer.
    """
    if profile is None or not any(path.name.startswith(_NATIVE) for path in profile.paths):
        return None
    plan = derive(choices_here(profile, settings))
    tables = [table for table in plan.tables if table.op == _OP]
    if hidden_size is not None:
        nearest = plan.table_for(_OP, hidden_size)
        tables = [nearest] if nearest is not None else []
    if not tables:
        return None
    bound = max(engine_cap(settings) or 0, _WORKSPACE_BYTES // settings.world_size)
    return min(bound, *(_fuses_up_to(table) for table in tables)) or None


def _fuses_up_to(table: Table) -> int:
    ends = [
        min(band.end_bytes - 1, table.validated_to)
        for band in table.bands
        if band.end_bytes is not None and _is_fused(band.path)
    ]
    return max(ends, default=0)


class Router:
    """Runs one tensor-parallel group's calls by the plan.

    Args:
        communicator: ours, on the group vLLM's communicator serves; runs native kernels.
        plan: the decisions over the paths this vLLM can run, equal on all ranks.
        plain: vLLM's own ``all_reduce`` of that group.
        pattern: FlashInfer's code of all-reduce + residual + RMSNorm without quantisation.
    """

    def __init__(self, communicator: Communicator, plan: Plan, plain: Any, pattern: Any) -> None:
        self.communicator, self.plan, self.plain = communicator, plan, plain
        self.pattern = pattern

    def fused(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of ``allreduce_fusion``; whatever we do not cover goes to ``original``."""
        if args or not self._covers(kwargs):
            return original(*args, **kwargs)
        x, residual = kwargs["input"], kwargs["residual_in"]
        path = self._path(_OP, x)
        if path.startswith(_FLASHINFER):
            return original(**kwargs)
        weight, eps = kwargs["rms_gamma"], kwargs["rms_eps"]
        bias = kwargs.get("weight_bias", 0.0)
        if path.startswith(_NATIVE):
            out, total = self.communicator.all_reduce_rms_norm(x, residual, weight, eps, bias)
        else:
            from fusewise.kernels.norm import residual_rms_norm

            out, total = residual_rms_norm(self.plain(x), residual, weight, eps, bias)
        # The outputs may be the inputs themselves; both results are whole, in stream order,
        # before either is overwritten.
        kwargs["residual_out"].copy_(total)
        kwargs["norm_out"].copy_(out)
        return kwargs["norm_out"]

    def _covers(self, kwargs: dict[str, Any]) -> bool:
        given = {name for name, value in kwargs.items() if value is not None}
        needed = {"input", "residual_in", "rms_gamma", "rms_eps", "norm_out", "residual_out"}
        return (
            kwargs.get("pattern") == self.pattern
            and needed <= given
            and not _QUANTISED & given
            and self._takes(kwargs["input"])
            and self._fits(kwargs["residual_in"], kwargs["rms_gamma"], kwargs["input"])
        )

    @staticmethod
    def _fits(residual: Tensor, weight: Tensor, x: Tensor) -> bool:
        return residual.shape == x.shape and residual.dtype == weight.dtype == x.dtype

    def _takes(self, x: Tensor) -> bool:
        return x.ndim == 2 and x.is_contiguous() and str(x.dtype) == f"torch.{self.plan.dtype}"

    def _path(self, op: Op, x: Tensor) -> str:
        return self.plan.band_at(op, x.shape[1], x.numel() * x.element_size()).path

    def all_reduce(self, x: Tensor) -> Tensor:
        """In place of the plain all-reduce: ours where the plan names a native kernel."""
        if self._takes(x) and self._path("all_reduce", x).startswith(_NATIVE):
            return self.communicator.all_reduce(x)
        result: Tensor = self.plain(x)
        return result


def install(vllm_communicator: Any, config: Any) -> None:
    """In a worker whose config says ``full``: routes the tensor-parallel group's calls.

    Collective over the group: each of its ranks builds vLLM's communicator, hence this, at once.
    """
    mark = getattr(config.compilation_config.pass_config, MARK, None)
    name = getattr(vllm_communicator, "unique_name", "")
    if mark is None or mark["mode"] != "full" or name.split(":")[0] != "tp":
        return
    moved = missing([FUSED_SEAM])
    if moved:
        raise UnavailableError("full mode is off: this vLLM has moved a seam", got=moved[0])
    import flashinfer.comm

    from fusewise.communicator import Communicator

    pattern = flashinfer.comm.AllReduceFusionPattern.kARResidualRMSNorm
    settings, profile = _here(vllm_communicator.world_size, config)
    communicator = Communicator(
        vllm_communicator.device_group,
        _only(profile, lambda path: path.startswith(_NATIVE)),
        max_message_bytes=int(mark["cap_mb"] * 2**20),
        max_hidden_size=config.model_config.get_hidden_size(),
    )
    plan = _plan_with(communicator, profile, settings)
    # The ranks have just agreed; what follows cannot fail on one of them alone.
    _silence_plain_flashinfer(vllm_communicator, settings)
    router = Router(communicator, plan, vllm_communicator.all_reduce, pattern)
    vllm_communicator.all_reduce = router.all_reduce
    wrap(flashinfer.comm, "allreduce_fusion", router.fused)
    if communicator.group.rank == 0:
        log.info("fusewise: full mode on: %s", "; ".join(_bands_text(plan)))


def _bands_text(plan: Plan) -> list[str]:
    return [
        f"hidden {table.hidden_size}: {', '.join(map(str, table.bands))}"
        for table in plan.tables
        if table.op == _OP
    ]


def _here(world_size: int, config: Any) -> tuple[VllmSettings, Profile]:
    """This worker's vLLM and its node's profile.

    Raises:
        FusewiseError: there is no profile any more, or a switch cannot be read.
    """
    from fusewise.node import probe
    from fusewise.store import find_profile

    dtype = parse_dtype(str(config.model_config.dtype))
    node = probe(world_size)
    custom = not config.parallel_config.disable_custom_all_reduce
    version = importlib.metadata.version("vllm")
    settings = settings_here(version, node, dtype, os.environ, custom_all_reduce=custom)
    profile = find_profile(node, dtype).profile
    if profile is None:
        raise UnavailableError("full mode is off: the profile has gone")
    return settings, profile


def _only(profile: Profile, keeps: Callable[[str], bool]) -> Profile:
    kept = tuple(sample for sample in profile.samples if keeps(sample.path))
    return profile.model_copy(update={"samples": kept})


def _plan_with(communicator: Communicator, profile: Profile, settings: VllmSettings) -> Plan:
    """The plan over what this vLLM and the native kernels that could be built can run.

    Raises:
        DisagreementError: ranks derived different plans.
        UnavailableError: no native kernel could be built; so on all ranks.
    """
    paths = communicator.plans[profile.dtype].paths()
    built = {path for path in paths if path.startswith(_NATIVE)}
    if not built:
        communicator.close()
        raise UnavailableError("full mode is off: no native kernel could be built")
    usable = _only(profile, lambda path: path in built or not path.startswith(_NATIVE))
    plan = derive(choices_here(usable, settings))
    communicator.group.agree("plan inside vLLM", plan.digest)
    return plan


def _silence_plain_flashinfer(vllm_communicator: Any, settings: VllmSettings) -> None:
    """The plan's unfused paths are vLLM's other all-reduces: FlashInfer's must not come first.

    It stays where vLLM holds a size of its own for it, as on some Blackwell nodes.
    """
    plain = getattr(vllm_communicator, "fi_ar_comm", None)
    own = displaced_choice(settings, engine_cap(settings) or 0)
    if plain is not None and not own.startswith("flashinfer"):
        plain.disabled = True
