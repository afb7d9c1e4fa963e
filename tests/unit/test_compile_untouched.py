"""What the pass must leave as it was, one graph each; no ranks, fake tensors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.traced import BF16, GROUP, H, collectives, fusion, normed, plain, reduced, trace


def _max(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x, "max"), w)


def _average(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x, "avg"), w)


def _other_group(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x, group="dp"), w)


def _reduced_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    y = reduced(x)
    return normed(r + y, w), y.relu()


def _square_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    square = s.pow(2)
    return w * (s * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6)), square


def _root_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    root = torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (s * root), root


def _residual_with_factor(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(torch.add(r, reduced(x), alpha=2), w)


def _other_dimension(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), w, dim=0)


def _other_power(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), w, power=4)


def _layer_norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return torch.nn.functional.layer_norm(r + reduced(x), (H,), w)


def _nothing_follows(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return reduced(x).relu()


def _bias_and_factor(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + (reduced(x) + w) * 2, w)


def _odd_factor(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x) * 0.22, w)


def _tensor_factor(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(x) * w[0], w)


def _slice_between(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(x)[1:], w)


def _two_groups(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(reduced(x), group="dp"), w)


def _eps_input(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    return w * (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + r[0, 0]))


def _fp8_before(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(x).to(torch.float8_e4m3fn).to(x.dtype) + r, w)


def _wide_sum_kept(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = reduced(x).float() + r.float()
    return (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16) * w, s


def _bias_between(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(x) + w, w)


def _waited_twice(x: Tensor, r: Tensor, w: Tensor) -> Any:
    y = collectives.all_reduce(x, "sum", GROUP)
    return normed(r + collectives.wait_tensor(y), w), collectives.wait_tensor(y)


def _weight_behind(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    return normed(s, s.sum(0))


def _row_split(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(x).view(16, 32), w[:32])


def _weight_of_another_norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return torch.ops.aten._fused_rms_norm(r, [H], reduced(x[0]), 1e-6)[0]


CASES: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "max": (_max, "the reduction is 'max'", {}),
    "average": (_average, "the reduction is 'avg'", {}),
    "another group": (_other_group, "another group: 'dp'", {}),
    "reduced tensor read again": (_reduced_used_elsewhere, "the reduced tensor is used", {}),
    "square read again": (_square_used_elsewhere, "an intermediate of the norm", {}),
    "root read again": (_root_used_elsewhere, "an intermediate of the norm", {}),
    "residual with a factor": (_residual_with_factor, "with a factor", {}),
    "another dimension": (_other_dimension, "no RMSNorm follows, but aten::mul, aten::pow", {}),
    "another power": (_other_power, "no RMSNorm follows", {}),
    "a factor behind a bias": (_bias_and_factor, "the sum with its addend is scaled", {}),
    "a factor of no power of two": (_odd_factor, "scaled by 0.22, which is no power of two", {}),
    "a factor that is a tensor": (_tensor_factor, "scaled by a tensor of one element", {}),
    "a slice": (_slice_between, "a slice stands between", {}),
    "an eps that is computed": (_eps_input, "eps is a graph input", {}),
    "fp8 before the residual": (_fp8_before, "a cast stands between", {"dtype": BF16}),
    "a wide sum read again": (_wide_sum_kept, "used in another dtype", {"dtype": BF16}),
    "layer norm": (_layer_norm, "LayerNorm follows, not RMSNorm", {}),
    "nothing follows": (_nothing_follows, "no RMSNorm follows, but aten::relu", {}),
    "bias alone": (_bias_between, "shapes differ: the residual is broadcast", {}),
    "waited twice": (_waited_twice, "not waited for exactly once", {}),
    "weight computed later": (_weight_behind, "computed behind the sum", {}),
    "rows split": (_row_split, "no RMSNorm follows", {}),
    "weight of another norm": (_weight_of_another_norm, "no RMSNorm follows", {}),
    "weight of one element": (plain, "is no row", {"weight": (1,)}),
    "residual of one row": (plain, "shapes differ", {"residual": (1, H)}),
    "no plan for the dtype": (plain, "no plan for float64", {"dtype": torch.float64}),
}


def test_the_reason_names_another_collective() -> None:
    module = trace(_two_groups)
    one = fusion()
    one(module.graph)
    assert one.sites[0].why.startswith("another collective follows: _c10d_functional::all_reduce")


@pytest.mark.parametrize("case", CASES)
def test_the_graph_stays_as_it_was(case: str) -> None:
    function, reason, options = CASES[case]
    module = trace(function, **options)
    before = str(module.graph)
    one = fusion()
    one(module.graph)
    assert str(module.graph) == before
    assert [site.choice for site in one.sites] == ["leave"]
    assert reason in one.sites[0].why
