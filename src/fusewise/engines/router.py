"""Full mode inside an engine: its fused op and plain all-reduce run our plan, shape by shape.

Engines look up ``flashinfer.comm.allreduce_fusion`` when they call it, and name where its results
go; both are kept. At each size the plan names a native kernel (ours runs), a FlashInfer kernel (the
original call runs, with the engine's own workspace) or an unfused path (the engine's own all-reduce
runs, then our norm). Where our kernel refuses a shape, the narrow cap decides between the two
others. Patterns with quantisation go to the original. How a worker takes it up, so that all ranks
choose alike, is each engine's ``takeover.py``'s business.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusewise.engines.base import EngineSettings
from fusewise.errors import FusewiseError
from fusewise.operation import Op, all_reduce_of, backend_of, is_unfused
from fusewise.profiles.bands import Plan, Table
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile, Sample
from fusewise.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.native.backend import NativeBackend

log = logging.getLogger("fusewise.engines")

FUSED_OP: Op = "all_reduce_rms_norm"
NATIVE, _FLASHINFER = "native.", "flashinfer."
_ALIGNMENT = 16  # bytes: the widest vector a kernel loads
# FlashInfer's one-shot kernels end at 64 MiB over the world size (vLLM's comment beside
# _FI_ALLREDUCE_ONE_SHOT_MAX_SIZES_MB); vLLM sizes FlashInfer's workspace by the cap.
_WORKSPACE_BYTES = 64 * 2**20
_QUANTISED = {"output", "quant_out", "scale_out"}  # arguments of patterns we do not cover


def choices_here(profile: Profile, settings: EngineSettings) -> Profile:
    """The profile without paths this engine cannot run: other kernels than its own, per size.

    Its baseline is what it fuses with, so that a tie keeps FlashInfer's kernel.
    """
    kept = tuple(s for s in profile.samples if _runs_here(s, profile, settings))
    baseline = settings.fused_choice(0, 0)
    return profile.model_copy(update={"samples": kept, "baseline": baseline})


def _runs_here(sample: Sample, profile: Profile, settings: EngineSettings) -> bool:
    size = Shape(sample.num_tokens, sample.hidden_size, profile.dtype).message_bytes
    own = settings.displaced_choice(size, sample.hidden_size)
    if sample.op == FUSED_OP:
        theirs = (settings.fused_choice(size, sample.hidden_size), own)
        return sample.path in theirs or sample.path.startswith(NATIVE)
    return sample.path.startswith(NATIVE) or sample.path == all_reduce_of(own)


def _is_fused(path: str) -> bool:
    return path.startswith((NATIVE, _FLASHINFER)) and not is_unfused(path)


def full_cap(
    profile: Profile | None, settings: EngineSettings, hidden_size: int | None
) -> int | None:
    """The largest size at which the plan fuses, bounded by what FlashInfer's workspace holds.

    None without a measured native kernel, or without times of the one it fuses with: then full
    mode has nothing to offer, or nothing to compare.
    """
    if profile is None:
        return None
    choices = choices_here(profile, settings)
    measured = {sample.path for sample in choices.samples if sample.op == FUSED_OP}
    if not all(any(p.startswith(kind) for p in measured) for kind in (NATIVE, _FLASHINFER)):
        return None
    plan = derive(choices)
    tables = [table for table in plan.tables if table.op == FUSED_OP]
    if hidden_size is not None:
        nearest = plan.table_for(FUSED_OP, hidden_size)
        tables = [nearest] if nearest is not None else []
    if not tables:
        return None
    bound = settings.cap_bytes(hidden_size) or 0
    if not settings.only_lowered:
        bound = max(bound, _WORKSPACE_BYTES // settings.world_size)
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
        native: our kernels on that group, by backend's id; on every rank the same.
        plan: the decisions over the paths this engine can run, equal on all ranks.
        plain: the engine's own ``all_reduce`` of that group.
        pattern: FlashInfer's code of all-reduce + residual + RMSNorm without quantisation.
        narrow_bytes: up to there FlashInfer's kernel never loses to the engine's own all-reduce.
    """

    def __init__(
        self,
        native: Mapping[str, NativeBackend],
        plan: Plan,
        plain: Any,
        pattern: Any,
        narrow_bytes: int,
    ) -> None:
        self.native, self.plan, self.plain, self.pattern = native, plan, plain, pattern
        self.narrow_bytes = narrow_bytes
        self._kernels: dict[tuple[Op, str, int, int], NativeBackend | None] = {}
        for kernel in native.values():
            kernel.on_death(end_worker)

    def fused(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of ``allreduce_fusion``; whatever we do not cover goes to ``original``."""
        if args or not self._covers(kwargs):
            return original(*args, **kwargs)
        x, residual = kwargs["input"], kwargs["residual_in"]
        norm, total = kwargs["norm_out"], kwargs["residual_out"]
        weight, eps = kwargs["rms_gamma"], kwargs["rms_eps"]
        bias = kwargs.get("weight_bias", 0.0)
        path = self._path(FUSED_OP, x)
        kernel = self._kernel(FUSED_OP, path, x)
        if kernel is None and self._falls_to_flashinfer(path, x):
            return original(**kwargs)
        if kernel is not None and _aligned(x, residual, weight, norm, total):
            kernel.all_reduce_rms_norm_into(norm, total, x, residual, weight, eps, bias)
            return norm
        # The outputs may be the inputs themselves; both results are whole, in stream order,
        # before either is overwritten.
        if kernel is not None:
            copies = (x.clone(), residual.clone(), weight.clone())
            results = kernel.all_reduce_rms_norm(*copies, eps, bias)
        else:
            from fusewise.backends.norm import residual_rms_norm

            results = residual_rms_norm(self.plain(x), residual, weight, eps, bias)
        total.copy_(results[1])
        norm.copy_(results[0])
        return norm

    def _covers(self, kwargs: dict[str, Any]) -> bool:
        given = {name for name, value in kwargs.items() if value is not None}
        needed = {"input", "residual_in", "rms_gamma", "rms_eps", "norm_out", "residual_out"}
        if kwargs.get("pattern") != self.pattern or not needed <= given or _QUANTISED & given:
            return False
        x, weight = kwargs["input"], kwargs["rms_gamma"]
        like_x = [kwargs[name] for name in ("residual_in", "norm_out", "residual_out")]
        return (
            self._takes(x)
            and all(other.shape == x.shape for other in like_x)
            and all(t.dtype == x.dtype and t.is_contiguous() for t in (weight, *like_x))
        )

    def _falls_to_flashinfer(self, path: str, x: Tensor) -> bool:
        """The plan names it; or names ours, which refuses the shape, within the narrow cap."""
        if path.startswith(NATIVE):
            return x.numel() * x.element_size() <= self.narrow_bytes
        return _is_fused(path)

    def _takes(self, x: Tensor) -> bool:
        return x.ndim == 2 and x.is_contiguous() and str(x.dtype) == f"torch.{self.plan.dtype}"

    def _path(self, op: Op, x: Tensor) -> str:
        return self.plan.band_at(op, x.shape[1], x.numel() * x.element_size()).path

    def _kernel(self, op: Op, path: str, x: Tensor) -> NativeBackend | None:
        key = (op, path, x.shape[0], x.shape[1])
        if key not in self._kernels:
            self._kernels[key] = self._chosen(op, path, Shape(key[2], key[3], self.plan.dtype))
        return self._kernels[key]

    def _chosen(self, op: Op, path: str, shape: Shape) -> NativeBackend | None:
        """Our kernel for a path, in the variant it names; None: not ours, or not this shape."""
        kernel = self.native.get(backend_of(path))
        if kernel is None or kernel.admits(shape):
            return None
        from fusewise.backends.base import select_variant

        select_variant(kernel, op, shape, path)  # one that is not there runs as the default
        return kernel

    def all_reduce(self, x: Tensor) -> Tensor:
        """In place of the plain all-reduce: ours where the plan names a native kernel."""
        op: Op = "all_reduce"
        kernel = self._kernel(op, self._path(op, x), x) if self._takes(x) else None
        if kernel is None:
            result: Tensor = self.plain(x)
            return result
        return kernel.all_reduce(x if _aligned(x) else x.clone())


def _aligned(*tensors: Tensor) -> bool:
    """Whether the kernels can address them. Decides about copies only, never about the path:
    ranks may differ in it, and must still run the same kernel."""
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)


def end_worker(error: FusewiseError) -> None:
    """Ends this process at once: from now on its group computes NaN, which must not be served.

    From the watchdog's thread, because a worker that replays graphs makes no call of ours. Engines
    watch their workers and fail when one ends.
    """
    log.critical("fusewise: this worker ends: %s", error)
    logging.shutdown()  # flushes every handler
    os._exit(error.exit_code)
