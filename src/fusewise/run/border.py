"""The border of a call: tensors are checked and made usable once, here, and nowhere below.

``rows_of`` copies or refuses; ``ready`` only looks, and ``like_these`` makes a look that costs a
tenth of it, for tensors that come again with the properties of those before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewise.backends.base import DTYPE_NAMES
from fusewise.errors import InputError

ROWS = 2  # dimensions: what backends take
ALIGNMENT = 16  # bytes: the widest vector a kernel loads


def like_these(*tensors: Tensor) -> Callable[..., bool]:
    """A look in C++: whether tensors have the type, dtype, device, sizes, strides, dispatch keys
    and ``requires_grad`` of these.

    Dynamo's own guard, read in torch 2.11.0 and 2.13.0; where it is another, ``ready`` looks.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: list[Any] = [list(t.shape) for t in tensors]
        strides: list[Any] = [list(t.stride()) for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = guards.check
    except (ImportError, AttributeError, TypeError):
        return unknown
    return check


def unknown(*tensors: Tensor) -> bool:
    """The look of one who remembers nothing."""
    return False


def ready(x: Tensor, residual: Tensor | None, weight: Tensor | None, here: torch.device) -> bool:
    """Whether kernels take these tensors as they are: here, contiguous, fitting ``x`` (of a dtype
    that was run before), and without a gradient to record. Addresses are the kernels' business."""
    tensors = [x]
    if weight is not None:
        if weight.ndim != 1 or weight.shape != x.shape[-1:]:
            return False
        tensors.append(weight)
    if residual is not None:
        if not isinstance(residual, Tensor) or residual.shape != x.shape:
            return False
        tensors.append(residual)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(t.dtype == x.dtype and t.device == here and t.is_contiguous() for t in tensors)


def rows_of(x: Tensor, name: str, device: torch.device) -> Tensor:
    """Usable and two-dimensional. No view where none is needed: each costs over 1 µs."""
    x = usable(x, name, device)
    if x.ndim == ROWS:
        return x
    return x.view(-1, x.shape[-1]) if x.numel() else x.view(0, x.shape[-1])


def usable(x: Tensor, name: str, device: torch.device) -> Tensor:
    """Of a known dtype, here, contiguous, aligned; a copy only where it must be."""
    if not isinstance(x, Tensor):
        raise no_tensor(name, x)
    if x.dtype not in DTYPE_NAMES or x.device != device or x.ndim == 0:
        raise InputError(
            f"{name} cannot be reduced",
            expected=f"bfloat16, float16 or float32 of one dimension or more on {device}",
            got=f"{x.dtype} of shape {tuple(x.shape)} on {x.device}",
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise no_gradient(name)
    return aligned(x if x.is_contiguous() else x.contiguous())


def operands(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The operands as kernels take them; copies where they must be, an error where none can."""
    rows = rows_of(x, "x", device)
    check_eps(eps)
    if residual is not None:
        if not isinstance(residual, torch.Tensor):
            raise no_tensor("residual", residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise mismatch("residual", residual, x.shape, x.dtype)
        residual = rows_of(residual, "residual", device)
    if not isinstance(weight, torch.Tensor):
        raise no_tensor("weight", weight)
    if weight.ndim != 1 or weight.numel() != rows.shape[1] or weight.dtype != x.dtype:
        raise mismatch("weight", weight, rows.shape[1:], x.dtype)
    return rows, residual, usable(weight, "weight", device)


def on_aligned(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` for tensors at any address."""
    return lambda *given: call(*(aligned(g) if isinstance(g, Tensor) else g for g in given))


def aligned(x: Tensor) -> Tensor:
    """At an address that a kernel's widest access allows; a copy where it is not."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def check_bounds(max_message_bytes: int, max_hidden_size: int, timeout_s: float) -> None:
    """What a communicator is sized and timed by."""
    bounds = max_message_bytes, max_hidden_size, timeout_s
    if not all(_finite(bound) and bound > 0 for bound in bounds):
        raise InputError(
            "a bound is not positive",
            expected="finite numbers > 0",
            got=f"{max_message_bytes=}, {max_hidden_size=}, {timeout_s=}",
        )


def check_eps(eps: float) -> None:
    """Refuses what makes a norm of nothing: looked at where a shape is new, not at every call."""
    if not _finite(eps) or eps < 0:
        raise InputError("eps", expected="a finite number >= 0", got=repr(eps))


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def no_tensor(name: str, got: object) -> InputError:
    """The error for something else where a tensor is needed."""
    return InputError(f"{name} is no tensor", expected="a torch.Tensor", got=type(got).__name__)


def no_gradient(name: str) -> InputError:
    """The error for a tensor by that name that would record one."""
    return InputError(
        "fusewise's operations have no gradient",
        got=f"{name} that requires one",
        hint="Call this under torch.no_grad() or torch.inference_mode().",
    )


def mismatch(name: str, got: Tensor, shape: torch.Size, dtype: torch.dtype) -> InputError:
    """The error for a tensor that does not go with ``x``."""
    return InputError(
        f"{name} does not fit x",
        expected=f"{dtype} of shape {tuple(shape)}",
        got=f"{got.dtype} of shape {tuple(got.shape)}",
    )
