"""Does a candidate compute the right thing here? Asked before anything is timed.

Integers first: sums that the dtype holds exactly must come out exactly. Then the whole operation
against a float64 reference within an error budget. Uninitialised memory is poisoned with NaN
meanwhile, so an element nobody wrote is wrong, and all ranks must hold the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fusewise.errors import VerificationError
from fusewise.operation import Op
from fusewise.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.base import Backend
    from fusewise.ranks.group import Group

EPS = 1e-6
# An element is wrong beyond this many units of the dtype's eps, relative to its own size or the
# row's. A sum rounded at each of 8 hops and a norm rounded once more stay below 4.5 half units.
_ELEMENT_BUDGET = 4.0
# Relative L2 error beyond this many eps is a systematic fault even if no element stands out.
_NORM_BUDGET = 1.0
# fp32 has no slack from the output's rounding: the order of the row's sum shows.
_FLOAT32_SLACK = 16.0
_INTEGER_LIMIT = 8  # 16 ranks · 8 = 128 < 256: exact in bf16, the narrowest dtype here


@dataclass(frozen=True)
class Check:
    """What came out of one verification on one rank; equal ``bits`` mean equal results."""

    wrong: int
    relative_error: float
    bits: tuple[int, ...]


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


def check_all_reduce(backend: Backend, group: Group, shape: Shape, seed: int) -> Check:
    """Exact sums of integers; ``x`` must keep its value."""
    inputs = [integers(shape, rank, group.device, seed) for rank in range(group.world_size)]
    x = inputs[group.rank].clone()
    expected = torch.stack(inputs).float().sum(0).to(x.dtype)
    with poisoned_memory():
        out = backend.all_reduce(x)
    wrong = int((out != expected).sum()) + int((x != inputs[group.rank]).sum())
    return Check(wrong, 0.0, _bits(out))


def check_all_reduce_rms_norm(
    backend: Backend,
    group: Group,
    shape: Shape,
    seed: int,
    *,
    with_residual: bool = True,
    weight_bias: float = 0.0,
) -> Check:
    """Norm and residual against float64, element by element and as a whole."""
    device, world = group.device, group.world_size
    inputs = [normals(shape, rank, device, seed) for rank in range(world)]
    residual = normals(shape, world, device, seed) if with_residual else None
    weight = normals(Shape(1, shape.hidden_size, shape.dtype), world + 1, device, seed).view(-1)
    with poisoned_memory():
        out, total = backend.all_reduce_rms_norm(
            inputs[group.rank].clone(), residual, weight, EPS, weight_bias
        )
    exact_out, exact_total = reference(inputs, residual, weight, EPS, weight_bias)
    slack = _FLOAT32_SLACK if shape.dtype == "float32" else 1.0
    eps = torch.finfo(out.dtype).eps * slack
    wrong, worst = 0, 0.0
    for got, exact in ((out, exact_out), (total, exact_total)):
        error = (got.double() - exact).abs_()
        row = exact.square().mean(-1, keepdim=True).sqrt()
        allowed = torch.maximum(exact.abs(), row).mul_(_ELEMENT_BUDGET * eps)
        wrong += int((~(error <= allowed)).sum())  # NaN compares false, so it counts as wrong
        worst = max(worst, float(error.norm() / exact.norm().clamp_min(1e-300)))
    if not worst <= _NORM_BUDGET * eps:
        wrong = max(wrong, 1)
    return Check(wrong, worst, (*_bits(out), *_bits(total)))


def reference(
    inputs: list[Tensor],
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``(norm, sum + residual)`` in float64 from every rank's input."""
    total = torch.zeros_like(inputs[0], dtype=torch.float64)
    for x in inputs:
        total += x
    if residual is not None:
        total += residual
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * scale * (weight.double() + weight_bias), total


def verify(backend: Backend, group: Group, op: Op, shape: Shape, seed: int) -> float:
    """Verifies one operation at one shape on every rank. Collective.

    Returns:
        The relative L2 error against float64, the largest over ranks (0 for integer sums).

    Raises:
        VerificationError: on every rank alike; names the ranks, the count and the error.
    """
    if op == "all_reduce":
        check = check_all_reduce(backend, group, shape, seed)
    else:
        check = check_all_reduce_rms_norm(backend, group, shape, seed)
    settle(group, f"{backend.id} {op} {shape}", check)
    return check.relative_error


def settle(group: Group, what: str, check: Check) -> None:
    """Turns every rank's check into one verdict.

    Raises:
        VerificationError: some rank counted wrong elements, or ranks hold different bits.
    """
    checks = group.gather(f"verify {what}", asdict(check))
    wrong = {r: c["wrong"] for r, c in zip(group.ranks, checks, strict=True) if c["wrong"]}
    if wrong:
        raise VerificationError(
            f"{what} is wrong",
            expected="the float64 reference within its budget, integers exactly",
            got=f"wrong elements by rank {wrong}, relative error {check.relative_error:.2e}",
        )
    if any(c["bits"] != checks[0]["bits"] for c in checks):
        raise VerificationError(f"{what} differs between ranks", expected="the same bits on all")


def _bits(x: Tensor) -> tuple[int, ...]:
    """Two checksums of the raw bits, the second sensitive to position."""
    words = x.contiguous().view(-1).view(torch.int16).to(torch.int64)
    place = torch.arange(words.numel(), device=x.device) % 8191 + 1
    return int(words.sum()), int((words * place).sum())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Everything ``torch.empty`` hands out meanwhile is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only the filling is wanted, not the advice
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        switch.fill_uninitialized_memory = fill
