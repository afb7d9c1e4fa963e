"""Operands and verdicts of a verification: values that break kernels, and results that are off."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusewise.errors import UnavailableError
from fusewise.operation import OPERATIONS
from fusewise.ranks import agreement
from fusewise.shape import DType, Shape
from fusewise.tune.operands import Case, Operands, operands
from fusewise.tune.stack_grid import StackGrid
from fusewise.tune.verify import judge, read, verdict
from tests.groups import MirrorGroup

WORLD = 2
CPU = torch.device("cpu")


def judged(case: Case, spoil: Callable[[Any], Any] = lambda results: None) -> Any:
    """The check of perfect results, rounded once, after ``spoil`` had them."""
    given = operands(case, WORLD, CPU)
    extra = (given.residual, given.weight, 1e-6, case.weight_bias)
    operation = OPERATIONS[case.op]
    exact = operation.reference(given.inputs, *(extra if operation.operands else ()))
    results = tuple(t.to(given.inputs[0].dtype) for t in exact)
    spoil(results)
    return read([judge(case, given, results, given.inputs[0].clone(), 0)])[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("op", ["all_reduce", "all_reduce_rms_norm"])
def test_perfect_results_pass_on_special_values(op: Any, dtype: DType) -> None:
    case = Case(op, Shape(10, 64, dtype), 3, "special")
    given = operands(case, WORLD, CPU)
    total = OPERATIONS["all_reduce"].reference(given.inputs)[0]
    assert total.isnan().any() and total.isinf().any() and (total == 0).any()
    assert ((total != 0) & (total.abs() < torch.finfo(given.inputs[0].dtype).smallest_normal)).any()
    assert judged(case).wrong == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_perfect_results_pass_where_small_weights_make_them_subnormal(dtype: DType) -> None:
    case = Case("all_reduce_rms_norm", Shape(10, 2048, dtype), 1)
    drawn = operands(case, WORLD, CPU)
    given = Operands(drawn.inputs, drawn.residual, drawn.weight * 2**-14)
    exact = OPERATIONS[case.op].reference(given.inputs, given.residual, given.weight, 1e-6)
    results = tuple(t.to(drawn.weight.dtype) for t in exact)
    assert read([judge(case, given, results, given.inputs[0].clone(), 0)])[0].wrong == 0


SPOILS: dict[str, Callable[[Any], Any]] = {
    "a NaN lost": lambda r: r[-1].nan_to_num_(nan=0.0, posinf=float("inf")),
    "an infinity lost": lambda r: r[-1].clamp_(max=100.0),
    "an infinity's sign": lambda r: r[-1].masked_fill_(r[-1].isinf(), float("-inf")),
    "a NaN more": lambda r: r[-1][0].fill_(float("nan")),
}


@pytest.mark.parametrize("how", SPOILS)
def test_a_special_value_lost_or_made_up_is_wrong(how: str) -> None:
    case = Case("all_reduce", Shape(10, 64), 3, "special")
    assert judged(case, SPOILS[how]).wrong > 0


def test_the_sum_of_integers_is_exact_or_wrong() -> None:
    case = Case("all_reduce_rms_norm", Shape(3, 64, "float32"), 1, "integers")
    assert judged(case).wrong == 0
    assert judged(case, lambda r: r[1][0, :1].mul_(1 + 2**-20)).wrong == 1


def _added_in_turns(given: Operands, order: list[int]) -> Any:
    """The sum as the worst of the backends makes it: rounded at every rank, then the residual."""
    total = given.inputs[order[0]].clone()
    for rank in order[1:]:
        total += given.inputs[rank]
    return total + given.residual


def _rounded_wherever(case: Case, given: Operands, total: Any) -> tuple[Any, Any]:
    """The norm of a rounded sum, itself rounded at every step a kernel may round at."""
    scale = torch.rsqrt(total.float().square().mean(-1, keepdim=True) + 1e-6)
    weight = given.weight + case.weight_bias
    return (total.float() * scale).to(total.dtype) * weight, total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("world_size", [2, 8, 16])
def test_sums_rounded_at_every_rank_are_right_in_any_order(world_size: int, dtype: DType) -> None:
    for seed in range(3):
        case = Case("all_reduce_rms_norm", Shape(64, 2880, dtype), seed, weight_bias=float(seed))
        given = operands(case, world_size, CPU)
        order = random.Random(seed).sample(range(world_size), world_size)
        results = _rounded_wherever(case, given, _added_in_turns(given, order))
        found = read([judge(case, given, results, given.inputs[0].clone(), 0)])[0]
        assert found.wrong == 0, f"{found.relative_error:.2e}"


@pytest.mark.parametrize("world_size", [2, 8, 16])
@pytest.mark.parametrize("what", ["a rank left out", "a rank twice", "the weight's neighbour"])
def test_one_wrong_row_is_seen_whatever_the_others_are(world_size: int, what: str) -> None:
    case = Case("all_reduce_rms_norm", Shape(64, 2880), 1)
    given = operands(case, world_size, CPU)
    good = _added_in_turns(given, list(range(world_size)))
    norm, total = _rounded_wherever(case, given, good)
    bad = {
        "a rank left out": good - given.inputs[-1], "a rank twice": good + given.inputs[-1],
        "the weight's neighbour": good,
    }[what]  # fmt: skip
    shifted = Operands(
        given.inputs, given.residual, given.weight.roll(1 if "weight" in what else 0)
    )
    wrong_norm, wrong_total = _rounded_wherever(case, shifted, bad)
    norm[7], total[7] = wrong_norm[7], wrong_total[7]
    found = read([judge(case, given, (norm, total), given.inputs[0].clone(), 0)])[0]
    assert found.wrong > 200


def test_the_first_failing_case_is_named_with_its_ranks() -> None:
    good = {"wrong": 0, "relative_error": 0.0, "bits": [1, 2]}
    bad, other = good | {"wrong": 3, "relative_error": 0.5}, good | {"bits": [1, 3]}
    assert verdict([[good, good], [good, good]], [0, 1]) is None
    found = verdict([[good, good], [good, bad]], [4, 5])
    assert found is not None
    assert found[0] == 1 and "by rank {5: 3}" in found[1]
    assert verdict([[good, other], [good, good]], [0, 1]) == (
        1, "differs between ranks: expected the same bits on all",
    )  # fmt: skip


def test_the_grid_has_every_form_and_the_wide_dtype_last() -> None:
    grid = StackGrid(("float32", "bfloat16", "float32"), (64,), (1, 4))
    assert grid.dtypes == ("bfloat16", "float32")
    cases = grid.cases("bfloat16", 64, ["all_reduce_rms_norm", "all_reduce"])
    assert len(set(map(str, cases))) == len(cases)
    assert {case.values for case in cases} == {"integers", "normals", "special"}
    assert any(not case.with_residual for case in cases)
    assert any(case.weight_bias for case in cases)
    assert max(case.shape.num_tokens for case in cases) == 4


def test_nccl_on_a_shared_gpu_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_gpu", lambda group: "GPU-1")
    monkeypatch.setattr(agreement.dist, "get_backend", lambda group: "nccl")
    with pytest.raises(UnavailableError, match=r"ranks share a GPU.*init_process_group\('gloo'\)"):
        agreement.fingerprint_of(MirrorGroup())
