"""torch.library schemas of our two operations, for torch.compile and for graph passes.

The implementations only look up the communicator that registered itself under ``group`` and call
it; shapes and dtypes are checked there. Importing this file registers the operators once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusewise.errors import InputError
from fusewise.run.communicator import Communicator
from fusewise.run.registry import communicator_for

__all__ = ["Communicator", "all_reduce", "all_reduce_rms_norm"]


@torch.library.custom_op("fusewise::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of all ranks' ``x``: [..., hidden_size], bf16, fp16 or fp32."""
    return communicator_for(group).all_reduce(x)


@all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fusewise::all_reduce_rms_norm", mutates_args=())
def all_reduce_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float, group: str
) -> tuple[Tensor, Tensor]:
    """``(norm, sum + residual)`` like ``x``; see ``Communicator.all_reduce_rms_norm``."""
    out, total = communicator_for(group).all_reduce_rms_norm(x, residual, weight, eps, weight_bias)
    return out, total


@all_reduce_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float, group: str
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _refuse(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    """Runs in the forward call of an operator, but only where a gradient would be recorded."""
    raise InputError(
        "fusewise's operators have no gradient",
        got="a tensor that requires one",
        hint="Call the model under torch.no_grad() or torch.inference_mode().",
    )


def _never(ctx: object, *gradients: Tensor) -> None:
    raise AssertionError("no gradient was recorded")


for _operator in (all_reduce, all_reduce_rms_norm):
    _operator.register_autograd(_never, setup_context=_refuse)
