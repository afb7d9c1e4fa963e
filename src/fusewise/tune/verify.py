"""Does a candidate compute the right thing here? Asked before anything is timed.

Integers first: sums that the dtype holds exactly must come out exactly. Then the whole operation
against a float64 reference, each element within its budget. Uninitialised memory is poisoned with
NaN meanwhile, so an element nobody wrote is wrong, and all ranks must hold the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fusewise.errors import VerificationError
from fusewise.operation import OPERATIONS
from fusewise.tune.budget import budgets
from fusewise.tune.operands import Case, Operands, dtype_of, operands

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.base import Backend
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

EPS = 1e-6
# Relative L2 error beyond this many eps is a systematic fault even if no element stands out.
_NORM_BUDGET = 1.0
# fp32 has no slack from the output's rounding: the order of the row's sum shows.
_FLOAT32_SLACK = 16.0


@dataclass(frozen=True)
class Check:
    """What came out of one verification on one rank; equal ``bits`` mean equal results."""

    wrong: int
    relative_error: float
    bits: tuple[int, ...]


def call(backend: Backend, case: Case, given: Operands, x: Tensor) -> tuple[Tensor, ...]:
    """The operation's results for this rank's ``x``."""
    if case.op == "all_reduce":
        return (backend.all_reduce(x),)
    return backend.all_reduce_rms_norm(x, given.residual, given.weight, EPS, case.weight_bias)


def judge(case: Case, given: Operands, results: tuple[Tensor, ...], x: Tensor, rank: int) -> Tensor:
    """Results against float64, still on the device: int64 words that ``read`` understands.

    Element by element and as a whole; sums of integers exactly; ``x`` must keep its value.
    """
    extra = (given.residual, given.weight, EPS, case.weight_bias)
    exact = OPERATIONS[case.op].reference(
        given.inputs, *(extra if OPERATIONS[case.op].operands else ())
    )
    wrong = (_words(x) != _words(given.inputs[rank])).sum()
    worst = torch.zeros((), dtype=torch.float64, device=x.device)
    allowed = budgets(given, exact, EPS, case.weight_bias)
    for got, want, error in zip(results, exact, allowed, strict=True):
        if want is exact[-1] and case.values == "integers":
            wrong = wrong + (got.double() != want).sum()
            continue
        wrong = wrong + _wrong_elements(got, want, error).sum()
        if case.values != "special":
            worst = torch.maximum(
                worst, (got.double() - want).norm() / want.norm().clamp_min(1e-300)
            )
    wrong = torch.where(worst <= _NORM_BUDGET * _eps(case.shape), wrong, wrong.clamp_min(1))
    sums = [word for got in results for word in _bits(got)]
    return torch.stack([wrong, worst.view(torch.int64), *sums])


def read(judged: list[Tensor]) -> list[Check]:
    """One wait for the device, however many were judged."""
    if not judged:
        return []
    flat = torch.cat(judged).cpu()
    checks = []
    for words in torch.split(flat, [one.numel() for one in judged]):
        error = float(words[1:2].view(torch.float64))
        checks.append(Check(int(words[0]), error, tuple(words[2:].tolist())))
    return checks


def _wrong_elements(got: Tensor, exact: Tensor, allowed: Tensor) -> Tensor:
    """Where ``got`` is beyond its budget; NaN and infinities must be where they belong."""
    near = (got.double() - exact).abs() <= allowed  # NaN compares false, so it counts as wrong
    odd = (got.double() == exact) | (got.isnan() & exact.isnan())
    return ~torch.where(exact.isfinite(), near, odd)


def _eps(shape: Shape) -> float:
    slack = _FLOAT32_SLACK if shape.dtype == "float32" else 1.0
    return torch.finfo(dtype_of(shape)).eps * slack


def _words(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.int16)


def _bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two checksums of the raw bits, the second sensitive to position."""
    words = _words(x).to(torch.int64)
    place = torch.arange(words.numel(), device=x.device) % 8191 + 1
    return words.sum(), (words * place).sum()


def check(backend: Backend, group: Group, case: Case) -> Check:
    """One call on this rank, its memory poisoned, and what came out."""
    given = operands(case, group.world_size, group.device)
    x = given.inputs[group.rank].clone()
    with poisoned_memory():
        results = call(backend, case, given, x)
    return read([judge(case, given, results, x, group.rank)])[0]


def verify(backend: Backend, group: Group, case: Case) -> float:
    """Verifies one call on every rank. Collective.

    Returns:
        The relative L2 error against float64 on this rank (0 for integer sums).

    Raises:
        VerificationError: on every rank alike; names the ranks, the count and the error.
    """
    found = check(backend, group, case)
    failed = verdict(group.gather(f"verify {backend.id}", [asdict(found)]), group.ranks)
    if failed:
        raise VerificationError(f"{backend.id} {case} {failed[1]}")
    return found.relative_error


def verdict(everyone: list[list[dict[str, Any]]], ranks: list[int]) -> tuple[int, str] | None:
    """The first of several checks that some rank failed, with the reason; None when all passed.

    Args:
        everyone: every rank's checks, in one order.
        ranks: their numbers.
    """
    for index, checks in enumerate(zip(*everyone, strict=True)):
        wrong = {r: c["wrong"] for r, c in zip(ranks, checks, strict=True) if c["wrong"]}
        if wrong:
            error = max(c["relative_error"] for c in checks)
            return index, f"is wrong: elements by rank {wrong}, relative error {error:.2e}"
        if any(tuple(c["bits"]) != tuple(checks[0]["bits"]) for c in checks):
            return index, "differs between ranks: expected the same bits on all"
    return None


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Everything ``torch.empty`` hands out meanwhile is NaN."""
    # Not use_deterministic_algorithms: that imports Inductor in every rank.
    before = torch.get_deterministic_debug_mode()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    switch.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only the filling is wanted, not the advice
            yield
    finally:
        torch.set_deterministic_debug_mode(before)
        switch.fill_uninitialized_memory = fill
