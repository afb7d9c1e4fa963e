"""torch.library schemas of our operations, for torch.compile and for graph passes.

The implementations only look up the communicator that ``group`` names and call it; shapes and
dtypes are checked there. Importing this file registers the operators once.

They are defined and implemented through ``torch.library.Library``, one entry of the dispatcher
each, and have no gradient: the border of a call refuses a tensor that records one, the fake kernel
does so while a model is traced. (``torch.library.custom_op`` goes through three layers of Python at
every call; ``benchmarks/call_overhead.py`` compares.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewise.backends.native.fp8 import Fp8, Scaling, check_static_scale
from fusewise.run.border import no_gradient
from fusewise.run.communicator import Communicator
from fusewise.run.registry import communicator_for

__all__ = ["Communicator"]

_library: Any = torch.library.Library("fusewise", "DEF")  # type: ignore[no-untyped-call]


def _operator(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One operator: a kernel for every device, and a fake one for tracing. Autograd is passed by:
    what it would do for an operator without a gradient, both kernels do by refusing."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fusewise::{name}", fake, lib=_library)


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return communicator_for(group).all_reduce(x)


def _fake_all_reduce(x: Tensor, group: str) -> Tensor:
    _refuse_gradient(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _all_reduce_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float, group: str
) -> tuple[Tensor, Tensor]:
    return communicator_for(group).untraced_norm(x, residual, weight, eps, weight_bias)


def _fake_all_reduce_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float, group: str
) -> tuple[Tensor, Tensor]:
    _refuse_gradient(x, residual, weight)
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _all_reduce_rms_norm_fp8(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    scaling: Scaling,
    static_scale: Tensor | None,
    keep_norm: bool,
    group: str,
) -> tuple[Tensor, ...]:
    found = communicator_for(group).all_reduce_rms_norm(
        x, residual, weight, eps, weight_bias,
        fp8=Fp8(scaling, keep_norm), static_scale=static_scale,
    )  # fmt: skip
    # No result of an operator may be one of its inputs.
    scales = found.scales if static_scale is None else found.scales.new_empty(0)
    norm = x.new_empty(0) if found.norm is None else found.norm
    return found.quantised, scales, found.residual_out, norm


def _fake_all_reduce_rms_norm_fp8(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    scaling: Scaling,
    static_scale: Tensor | None,
    keep_norm: bool,
    group: str,
) -> tuple[Tensor, ...]:
    _refuse_gradient(x, residual, weight)
    fp8 = Fp8(scaling, keep_norm)
    check_static_scale(fp8, static_scale, x.device)
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = (*x.shape[:-1], fp8.scales_shape(1, x.shape[-1])[-1])
    return (
        torch.empty_like(like, dtype=torch.float8_e4m3fn),
        x.new_empty(shape if static_scale is None else (0,), dtype=torch.float32),
        like,
        torch.empty_like(like) if keep_norm else x.new_empty(0),
    )


def _refuse_gradient(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise no_gradient("a tensor")


# The sum of all ranks' x: [..., hidden_size], bf16, fp16 or fp32.
_operator("all_reduce", "(Tensor x, str group) -> Tensor", _all_reduce, _fake_all_reduce)
# (norm, sum + residual) like x; see Communicator.all_reduce_rms_norm.
_operator(
    "all_reduce_rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, str group)"
    " -> (Tensor, Tensor)",
    _all_reduce_rms_norm,
    _fake_all_reduce_rms_norm,
)
# (quantised, scales, sum + residual, norm): scales is empty with a static one, norm unless kept.
_operator(
    "all_reduce_rms_norm_fp8",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, str scaling,"
    " Tensor? static_scale, bool keep_norm, str group) -> (Tensor, Tensor, Tensor, Tensor)",
    _all_reduce_rms_norm_fp8,
    _fake_all_reduce_rms_norm_fp8,
)
