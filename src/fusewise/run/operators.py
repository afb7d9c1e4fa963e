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

from fusewise.run.border import no_gradient
from fusewise.run.communicator import Communicator
from fusewise.run.registry import communicator_for

__all__ = ["Communicator"]

_library: Any = torch.library.Library("fusewise", "DEF")  # type: ignore[no-untyped-call]


def _operator(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One operator: a kernel for every device, and a fake one for tracing."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusewise::{name}", fake, lib=_library)


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return communicator_for(group).all_reduce(x)


def _fake_all_reduce(x: Tensor, group: str) -> Tensor:
    _refuse_gradient(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _all_reduce_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float, group: str
) -> tuple[Tensor, Tensor]:
    return communicator_for(group).all_reduce_rms_norm(x, residual, weight, eps, weight_bias)


def _fake_all_reduce_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float, group: str
) -> tuple[Tensor, Tensor]:
    _refuse_gradient(x, residual, weight)
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


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
