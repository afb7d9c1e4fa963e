"""The reference quantiser: its scales, its edges, and what must not pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusewise.backends.native.fp8 import (
    FP8_MAX,
    GROUP,
    MIN_LARGEST,
    MIN_SCALE,
    Fp8,
    Scaling,
    quantise,
)
from fusewise.errors import InputError


def test_a_tokens_largest_element_becomes_448() -> None:
    norm = torch.tensor([[0.5, -2.0, 1.0] + [0.0] * 5, [3.0] * 8])
    quantised, scales = quantise(norm, Fp8("token"))
    assert torch.equal(scales, torch.tensor([[2.0], [3.0]]) / FP8_MAX)
    assert quantised.float().abs().amax(1).tolist() == [FP8_MAX, FP8_MAX]
    restored = quantised.float() * scales
    assert torch.allclose(restored, norm, rtol=2**-4)


def test_a_row_of_zeros_keeps_a_finite_scale() -> None:
    quantised, scales = quantise(torch.zeros(1, 8), Fp8("token"))
    assert scales.item() == pytest.approx(MIN_SCALE)
    assert quantised.float().tolist() == [[0.0] * 8]


@pytest.mark.parametrize(("hidden_size", "groups"), [(128, 1), (136, 2), (2880, 23), (4096, 32)])
def test_groups_of_128_and_a_shorter_last_one(hidden_size: int, groups: int) -> None:
    norm = torch.randn(3, hidden_size)
    _, scales = quantise(norm, Fp8("group"))
    assert scales.shape == (3, groups) == Fp8("group").scales_shape(3, hidden_size)
    last = norm[:, (groups - 1) * GROUP :].abs().amax(1) / FP8_MAX
    assert torch.equal(scales[:, -1], last)


def test_a_group_of_zeros_keeps_a_finite_scale() -> None:
    quantised, scales = quantise(torch.zeros(1, 256), Fp8("group"))
    assert scales.tolist() == [[pytest.approx(MIN_LARGEST / FP8_MAX)] * 2]
    assert quantised.float().abs().max() == 0.0


@pytest.mark.parametrize("scaling", ["static", "token", "group"])
def test_an_empty_message_has_empty_results(scaling: Scaling) -> None:
    scale = torch.ones(1) if scaling == "static" else None
    quantised, scales = quantise(torch.empty(0, 264), Fp8(scaling), scale)
    assert quantised.shape == (0, 264)
    assert scales.shape == Fp8(scaling).scales_shape(0, 264)


def _near_ties() -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 rows whose elements lie at the middle between two codes, and each row's scale."""
    generator = torch.Generator().manual_seed(3)
    largest = torch.rand(200, 1, generator=generator) * 10 + 0.1
    scales = largest / FP8_MAX
    codes = torch.arange(8, 2**7 - 2, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[:-1] + codes[1:]) / 2
    norm = torch.cat([scales * middles, largest, torch.zeros(200, 128 - 1 - len(middles))], 1)
    return norm, scales


@pytest.mark.parametrize("scaling", ["static", "token", "group"])
def test_dynamic_scales_divide_and_static_ones_multiply_by_the_reciprocal(scaling: Scaling) -> None:
    # vLLM's quantisers do one in each case; at the middle of two codes they round differently.
    norm, scales = _near_ties()
    value, by = norm.numpy(), scales.numpy()
    ways = {"divides": value / by, "multiplies": value * (np.float32(1) / by)}
    codes = {name: torch.from_numpy(way).to(torch.float8_e4m3fn) for name, way in ways.items()}
    if scaling == "static":
        rows = [
            quantise(row[None], Fp8("static"), s)[0] for row, s in zip(norm, scales, strict=True)
        ]
        got = torch.cat(rows)
    else:
        got, made = quantise(norm, Fp8(scaling))
        assert torch.equal(made, scales)
    right, wrong = ("multiplies", "divides") if scaling == "static" else ("divides", "multiplies")
    assert torch.equal(got.float(), codes[right].float())
    assert not torch.equal(got.float(), codes[wrong].float())


def test_a_static_scale_saturates_and_keeps_nan() -> None:
    norm = torch.tensor([[1000.0, -1e9, float("inf"), float("nan"), 448.0, 0.25, -0.0, 1.0]])
    quantised, scales = quantise(norm, Fp8("static"), torch.tensor([1.0]))
    value = quantised.float()[0]
    assert value[:3].tolist() == [FP8_MAX, -FP8_MAX, FP8_MAX]
    assert value[3].isnan()
    assert value[4:].tolist() == [448.0, 0.25, 0.0, 1.0]
    assert torch.signbit(value[6])
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize(
    ("fp8", "scale"),
    [
        (Fp8("static"), None),
        (Fp8("token"), torch.ones(1)),
        (Fp8("group"), torch.ones(1)),
        (Fp8("static"), torch.ones(2)),
        (Fp8("static"), torch.ones(1, dtype=torch.float64)),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(fp8: Fp8, scale: torch.Tensor | None) -> None:
    with pytest.raises(InputError):
        quantise(torch.ones(1, 8), fp8, scale)


def test_results_are_allocated_as_described() -> None:
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    result = Fp8("group", keep_norm=True).empty_result(x, None)
    assert result.quantised.dtype == torch.float8_e4m3fn and result.quantised.shape == x.shape
    assert result.scales.shape == (3, 2) and result.scales.dtype == torch.float32
    assert result.norm is not None and result.norm.dtype == x.dtype
    assert Fp8("token").empty_result(x, None).norm is None


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(InputError, match="one of static, token, group"):
        Fp8("tensor")  # type: ignore[arg-type]
