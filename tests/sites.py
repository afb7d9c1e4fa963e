"""Every form of a site that the pass knows, as functions ``f(x, r, w)`` over the world group.

Needs a process group. The engines' operators are stand-ins with the schemas that vLLM registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import Tensor
from torch.nn.functional import rms_norm

from fusewise.backends.native.fp8 import FP8_MAX, GROUP, MIN_LARGEST, Fp8, quantise
from fusewise.backends.norm import residual_rms_norm

H = 64
PATTERNS = (
    "llama, residual", "llama, residual first read", "llama, sum not used again",
    "llama, no residual", "llama, no residual, sum used again", "llama, large eps",
    "gemma, residual", "gemma, no residual", "torch, residual", "torch, no residual",
    "power −0.5", "dist.all_reduce", "our all_reduce", "opaque all_reduce", "vllm_ir.rms_norm",
    "vllm_ir.fused_add", "_C.fused_add", "_C.rms_norm", "rows regrouped", "another group's name",
)  # fmt: skip


def llama(s: Any, w: Any, eps: float = 1e-6) -> Any:
    h = s.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(s.dtype)


def gemma(s: Any, w: Any) -> Any:
    h = s.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + w.float())).type_as(s)


def power(s: Any, w: Any) -> Any:
    h = s.float()
    return w * (h * torch.pow((h * h).mean(-1, keepdim=True) + 1e-6, -0.5)).to(s.dtype)


def added(norm: Any, r: Any, y: Any, w: Any) -> Any:
    s = r + y
    return norm(s, w), s


def torch_norm(s: Any, w: Any) -> Any:
    return rms_norm(s, (H,), w, 1e-5)


def patterns() -> dict[str, Callable[..., Any]]:
    """name → f(x, r, w): the norm, and the sum where it is used again later."""
    _register_engine_ops()
    _register_compiled_ops()
    world = dist.group.WORLD
    name = world.group_name
    again = dist.new_group([0, 1])
    ops = torch.ops

    def reduce(x: Any) -> Any:
        return fc.all_reduce(x, "sum", world)

    def in_place(x: Any) -> Any:
        y = x * 1
        dist.all_reduce(y)
        return y

    def fused_add(x: Any, r: Any, w: Any) -> Any:
        y = reduce(x)
        r = r.clone()
        ops._C.fused_add_rms_norm(y, r, w, 1e-6)
        return y, r

    def out_norm(x: Any, r: Any, w: Any) -> Any:
        y = reduce(x)
        out = torch.empty_like(y)
        ops._C.rms_norm(out, y, w, 1e-6)
        return out + r

    def regrouped(x: Any, r: Any, w: Any) -> Any:
        s = r.view(1, -1, H) + reduce(x).view(1, -1, H)
        return llama(s, w), s

    return {
        "llama, residual": lambda x, r, w: added(llama, r, reduce(x), w),
        "llama, residual first read": lambda x, r, w: added(llama, reduce(x), r, w),
        "llama, sum not used again": lambda x, r, w: llama(r + reduce(x), w),
        "llama, no residual": lambda x, r, w: llama(reduce(x), w) + r,
        "llama, no residual, sum used again": lambda x, r, w: _twice(llama, reduce(x), r, w),
        "llama, large eps": lambda x, r, w: llama(r + reduce(x), w, 0.25),
        "gemma, residual": lambda x, r, w: added(gemma, r, reduce(x), w),
        "gemma, no residual": lambda x, r, w: r + gemma(reduce(x), w),
        "torch, residual": lambda x, r, w: added(torch_norm, r, reduce(x), w),
        "torch, no residual": lambda x, r, w: torch_norm(reduce(x), w) + r,
        "power −0.5": lambda x, r, w: added(power, r, reduce(x), w),
        "dist.all_reduce": lambda x, r, w: added(llama, r, in_place(x), w),
        "our all_reduce": lambda x, r, w: added(llama, r, ops.fusewise.all_reduce(x, name), w),
        "opaque all_reduce": lambda x, r, w: added(llama, r, ops.vllm.all_reduce(x, "tp:0"), w),
        "vllm_ir.rms_norm": lambda x, r, w: added(
            lambda s, w: ops.vllm_ir.rms_norm(s, w, 1e-6), r, reduce(x), w
        ),
        "vllm_ir.fused_add": lambda x, r, w: ops.vllm_ir.fused_add_rms_norm(reduce(x), r, w, 1e-6),
        "_C.fused_add": fused_add,
        "_C.rms_norm": out_norm,
        "rows regrouped": regrouped,
        "another group's name": lambda x, r, w: added(llama, r, fc.all_reduce(x, "sum", again), w),
    }


def _twice(norm: Any, y: Any, r: Any, w: Any) -> Any:
    return norm(y, w), y + r


def _register_engine_ops() -> None:
    """Stand-ins with the schemas that vLLM registers."""

    @torch.library.custom_op("vllm::all_reduce", mutates_args=())
    def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
        out = tensor.clone()
        dist.all_reduce(out)
        return out

    all_reduce.register_fake(lambda tensor, group_name: torch.empty_like(tensor))

    @torch.library.custom_op("vllm_ir::rms_norm", mutates_args=())
    def ir_norm(
        x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> Tensor:
        assert weight is not None
        return residual_rms_norm(x, None, weight, epsilon)[0]

    ir_norm.register_fake(lambda x, weight, epsilon, variance_size=None: torch.empty_like(x))

    @torch.library.custom_op("vllm_ir::fused_add_rms_norm", mutates_args=())
    def ir_add_norm(
        x: Tensor,
        x_residual: Tensor,
        weight: Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert weight is not None
        return residual_rms_norm(x, x_residual, weight, epsilon)

    ir_add_norm.register_fake(lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))


def _register_compiled_ops() -> None:
    """Those of its compiled part, which write into their arguments."""

    @torch.library.custom_op("_C::fused_add_rms_norm", mutates_args=("input", "residual"))
    def c_add_norm(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
        norm, total = residual_rms_norm(input, residual, weight, epsilon)
        input.copy_(norm)
        residual.copy_(total)

    @torch.library.custom_op("_C::rms_norm", mutates_args=("result",))
    def c_norm(result: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
        result.copy_(residual_rms_norm(input, None, weight, epsilon)[0])

    @torch.library.custom_op("_C::static_scaled_fp8_quant", mutates_args=("result",))
    def c_static(
        result: Tensor, input: Tensor, scale: Tensor, group_shape: list[int] | None = None
    ) -> None:
        result.copy_(quantise(input, Fp8("static"), scale)[0])

    @torch.library.custom_op(
        "_C::dynamic_per_token_scaled_fp8_quant", mutates_args=("result", "scale")
    )
    def c_token(result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
        for into, made in zip((result, scale), quantise(input, Fp8("token")), strict=True):
            into.copy_(made)

    @torch.library.custom_op("_C::per_token_group_fp8_quant", mutates_args=("output_q", "output_s"))
    def c_group(
        input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float,
        fp8_min: float, fp8_max: float, scale_ue8m0: bool,
    ) -> None:  # fmt: skip
        for into, made in zip((output_q, output_s), quantise(input, Fp8("group")), strict=True):
            into.copy_(made)

    for operator in (c_add_norm, c_norm, c_static, c_token, c_group):
        operator.register_fake(lambda *_: None)


def quantised(name: str, group_size: int = GROUP) -> Callable[..., Any]:
    """f(x, r, w) → the norm quantised as vLLM's operators do it, its scales, and the sum.

    ``name``: a scaling; ``"… kept"`` where the norm itself is read too. Needs ``patterns()`` first.
    """
    scaling, _, kept = name.partition(" ")

    def function(x: Any, r: Any, w: Any) -> Any:
        scales = w[:1].float().abs() + 0.01  # a static one
        norm, s = added(llama, r, fc.all_reduce(x, "sum", dist.group.WORLD), w)
        q = torch.empty_like(norm, dtype=torch.float8_e4m3fn)
        rows, ops = norm.shape[0], torch.ops._C
        if scaling == "static":
            ops.static_scaled_fp8_quant(q, norm, scales, None)
        elif scaling == "token":
            scales = norm.new_empty((rows, 1), dtype=torch.float32)
            ops.dynamic_per_token_scaled_fp8_quant(q, norm, scales, None)
        else:
            scales = norm.new_empty((rows, -(-H // GROUP)), dtype=torch.float32)
            ops.per_token_group_fp8_quant(
                norm, q, scales, group_size, MIN_LARGEST, -FP8_MAX, FP8_MAX, False
            )
        return (q, scales, s, norm * 2) if kept else (q, scales, s)

    return function
