"""The border of a call: tensors are checked and made usable once, here, and nowhere below.

On the hot path of every eager call, so it makes no view and no copy that is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusewise.backends.base import DTYPE_NAMES
from fusewise.errors import InputError

ROWS = 2  # dimensions: what backends take
ALIGNMENT = 16  # bytes: the widest vector a kernel loads


def rows_of(x: Tensor, name: str, device: torch.device) -> Tensor:
    """Usable and two-dimensional. No view where none is needed: each costs over 1 µs."""
    x = usable(x, name, device)
    if x.ndim == ROWS:
        return x
    return x.view(-1, x.shape[-1]) if x.numel() else x.view(0, x.shape[-1])


def usable(x: Tensor, name: str, device: torch.device) -> Tensor:
    """Of a known dtype, here, contiguous, aligned; a copy only where it must be."""
    if x.dtype not in DTYPE_NAMES or x.device != device or x.ndim == 0:
        raise InputError(
            f"{name} cannot be reduced",
            expected=f"bfloat16, float16 or float32 on {device}",
            got=f"{x.dtype} of shape {tuple(x.shape)} on {x.device}",
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name} needs a gradient", hint="Call this under torch.no_grad().")
    if not x.is_contiguous():
        x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def mismatch(name: str, got: Tensor, shape: torch.Size, dtype: torch.dtype) -> InputError:
    """The error for a tensor that does not go with ``x``."""
    return InputError(
        f"{name} does not fit x",
        expected=f"{dtype} of shape {tuple(shape)}",
        got=f"{got.dtype} of shape {tuple(got.shape)}",
    )
