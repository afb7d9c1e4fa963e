"""Residual-add + RMSNorm in one pass: the kernel every unfused path ends in.

On GPUs a Triton kernel, one program per row; on CPUs torch. fp32 from the load to the store.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_MAX_BLOCK = 65536  # elements of one row a single Triton program holds in registers


def residual_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; ``s · rsqrt(mean(s²) + eps) · (weight + weight_bias)``, per row.

    Args:
        x: contiguous [num_tokens, hidden_size]; bf16, fp16 or fp32.
        residual: like ``x``; None adds nothing.
        weight: [hidden_size].
        eps: added to the mean square.
        weight_bias: 1.0 for Gemma.

    Returns:
        ``(norm, s)`` in the dtype of ``x``. Without a residual ``s`` is ``x`` itself.
    """
    if x.is_cuda and x.shape[1] <= _MAX_BLOCK:
        return _on_gpu(x, residual, weight, eps, weight_bias)
    total = x.float() if residual is None else x.float() + residual.float()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    norm = (total * scale * (weight.float() + weight_bias)).to(x.dtype)
    return norm, x if residual is None else total.to(x.dtype)


def _on_gpu(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    num_tokens, hidden_size = x.shape
    norm = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if num_tokens == 0:
        return norm, total
    block = 1 << (hidden_size - 1).bit_length()
    with torch.cuda.device(x.device):  # Triton launches on the current device
        _triton_kernel()[(num_tokens,)](
            x, residual if residual is not None else x, weight, norm, total,
            hidden_size, eps, weight_bias,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return norm, total


@functools.lru_cache(maxsize=1)
def _triton_kernel() -> Any:
    from fusewise.backends.norm_triton import residual_rms_norm_kernel

    return residual_rms_norm_kernel
