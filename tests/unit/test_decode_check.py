"""The check of a decode run: what rounding does passes; another model's logits do not."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.decode.check import confirm, difference, nudged
from fusewise.errors import VerificationError


def model_with(weight: torch.Tensor) -> Any:
    return SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_nudge_moves_every_embedding_by_its_last_bit_and_is_taken_back(
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(64, 32).to(dtype)
    before = weight.clone()
    with nudged(model_with(weight)):
        moved = (weight - before).abs() / before.abs()
        assert (weight != before).all() and (moved <= torch.finfo(dtype).eps).all()
    assert torch.equal(weight, before)


def test_a_nudge_is_taken_back_after_a_failure() -> None:
    weight = torch.ones(2, 2)
    with pytest.raises(ZeroDivisionError), nudged(model_with(weight)):
        raise ZeroDivisionError
    assert torch.equal(weight, torch.ones(2, 2))


def test_a_difference_is_of_the_size_and_of_the_median_sequence() -> None:
    reference = torch.tensor([[1.0, -4.0], [2.0, 1.0], [8.0, 8.0]])
    off = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    assert difference(reference + off, reference) == 0.25


@pytest.mark.parametrize(
    ("off", "rounding", "passes"),
    [
        (0.099, 0.001, True),
        (0.101, 0.001, False),
        (0.59, 0.2, True),
        (0.61, 0.2, False),
        (0.89, 0.7, True),
        (0.91, 0.7, False),
        (float("nan"), 0.7, False),
    ],
)
def test_what_rounding_does_is_the_measure(off: float, rounding: float, passes: bool) -> None:
    arms = {"unfused": 0.0, "measured": off}
    refused = pytest.raises(VerificationError, match="logits of measured are wrong")
    with nullcontext() if passes else refused:
        confirm(arms, rounding)


def test_logits_of_another_model_are_further_off_than_rounding_may_be() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 8, 1000, generator=generator)
    with pytest.raises(VerificationError):
        confirm({"measured": difference(other, one)}, rounding=10.0)
