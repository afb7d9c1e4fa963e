"""What the pass must leave as it was, one graph each; no ranks, fake tensors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.traced import BF16, FP32, GROUP, H, collectives, fusion, normed, plain, reduced, trace


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


def _scaled_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    scaled = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * scaled, scaled


def _residual_with_factor(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(torch.add(r, reduced(x), alpha=2), w)


def _other_dimension(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), w, dim=0)


def _other_power(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), w, power=4)


def _no_weight(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    return s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)


def _gate_for_weight(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), r)


def _layer_norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return torch.nn.functional.layer_norm(r + reduced(x), (H,), w)


def _nothing_follows(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return reduced(x).relu()


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
    "scaled read again": (_scaled_used_elsewhere, "an intermediate of the norm", {}),
    "residual with a factor": (_residual_with_factor, "with a factor", {}),
    "another dimension": (_other_dimension, "no RMSNorm follows", {}),
    "another power": (_other_power, "no RMSNorm follows", {}),
    "no weight": (_no_weight, "no weight of one row", {}),
    "gate for weight": (_gate_for_weight, "no weight of one row", {}),
    "layer norm": (_layer_norm, "no RMSNorm follows", {}),
    "nothing follows": (_nothing_follows, "no RMSNorm follows", {}),
    "bias between": (_bias_between, "shapes differ", {}),
    "waited twice": (_waited_twice, "not waited for exactly once", {}),
    "weight computed later": (_weight_behind, "computed behind the sum", {}),
    "rows split": (_row_split, "no RMSNorm follows", {}),
    "weight of another norm": (_weight_of_another_norm, "no RMSNorm follows", {}),
    "weight of one element": (plain, "is no row", {"weight": (1,)}),
    "residual of one row": (plain, "shapes differ", {"residual": (1, H)}),
    "wide weight": (plain, "dtypes differ", {"dtype": BF16, "weight_dtype": FP32}),
    "wide residual": (plain, "dtypes differ", {"dtype": BF16, "residual_dtype": FP32}),
    "no plan for the dtype": (plain, "no plan for torch.float64", {"dtype": torch.float64}),
}


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
