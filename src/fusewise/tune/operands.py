"""What a verification passes to a call: whole numbers, normals, and values that break kernels.

Made on the device from a seed, alike on every rank, so that each can compute what all of them sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from fusewise.operation import OPERATIONS, Op
from fusewise.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor

_INTEGER_LIMIT = 8  # 16 ranks · 8 = 128 < 256: exact in bf16, the narrowest dtype here

Values = Literal["integers", "normals", "special"]


@dataclass(frozen=True)
class Case:
    """One call to be verified: what is computed, on which values.

    ``integers`` are summed exactly by every dtype; ``special`` are rows with signed zeros,
    subnormals, an infinity, a NaN and the bit pattern 0xff… among normals.
    """

    op: Op
    shape: Shape
    seed: int = 0
    values: Values = "normals"
    with_residual: bool = True
    weight_bias: float = 0.0

    def __str__(self) -> str:
        marks: list[str] = [self.values] if self.values != "normals" else []
        marks += [] if self.with_residual else ["no residual"]
        marks += [f"weight bias {self.weight_bias:g}"] if self.weight_bias else []
        return f"{self.op} {self.shape}{' ' if marks else ''}{', '.join(marks)}"


@dataclass(frozen=True)
class Operands:
    """Every rank's ``x`` and what all of them pass beside it, the same on whichever rank made."""

    inputs: list[Tensor]
    residual: Tensor | None
    weight: Tensor


def usual(op: Op, shape: Shape, seed: int) -> Case:
    """How an operation is verified where one case must do: bare sums on integers."""
    return Case(op, shape, seed, "integers" if op == "all_reduce" else "normals")


def dtype_of(shape: Shape) -> torch.dtype:
    """torch's dtype of a shape."""
    found: torch.dtype = getattr(torch, shape.dtype)
    return found


def integers(shape: Shape, rank: int, device: torch.device, seed: int) -> Tensor:
    """Integers in ±8, the same for a (rank, seed) on whichever rank they are made."""
    generator = torch.Generator(device).manual_seed(seed * 1009 + rank)
    size = (shape.num_tokens, shape.hidden_size)
    low, high = -_INTEGER_LIMIT, _INTEGER_LIMIT + 1
    return torch.randint(low, high, size, generator=generator, device=device).to(dtype_of(shape))


def normals(shape: Shape, rank: int, device: torch.device, seed: int) -> Tensor:
    """Standard normals, the same for a (rank, seed) on whichever rank they are made."""
    generator = torch.Generator(device).manual_seed(seed * 1009 + rank)
    size = (shape.num_tokens, shape.hidden_size)
    return torch.randn(size, generator=generator, device=device).to(dtype_of(shape))


def special(shape: Shape, rank: int, device: torch.device, seed: int) -> Tensor:
    """Normals, with a row of signed zeros, one of subnormals, and one odd value in the others."""
    x = normals(shape, rank, device, seed)
    tiny = torch.finfo(x.dtype).smallest_normal / 32  # the sum of 16 ranks is still one
    for row, values in enumerate(x):
        if row % 5 == 0:
            values.fill_(-0.0 if rank % 2 else 0.0)
        elif row % 5 == 1:
            values.fill_(-tiny if row % 2 else tiny)
        elif rank == row % 2:  # one rank's odd value must reach all
            at = values[(13 * row) % shape.hidden_size :][:1]
            if row % 5 == 4:
                at.view(torch.uint8).fill_(0xFF)  # what our kernels mark empty slots with
            else:
                at.fill_(float("inf") if row % 5 == 2 else float("nan"))
    return x


_MAKERS = {"integers": integers, "normals": normals, "special": special}


def operands(case: Case, world_size: int, device: torch.device) -> Operands:
    """What all ranks pass to one call, made alike on each of them."""
    make, shape = _MAKERS[case.values], case.shape
    residual = None
    if OPERATIONS[case.op].operands and case.with_residual:
        fill = integers if case.values == "integers" else normals
        residual = fill(shape, world_size, device, case.seed)
    row = Shape(1, shape.hidden_size, shape.dtype)
    return Operands(
        [make(shape, rank, device, case.seed) for rank in range(world_size)],
        residual,
        normals(row, world_size + 1, device, case.seed).view(-1),
    )
