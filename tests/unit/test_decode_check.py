"""The check of a decode run: what rounding does passes; another model's logits do not."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.decode.check import compare, confirm, difference, nudged
from fusewise.decode.step import Batch, PrefillRunner
from fusewise.errors import VerificationError


def model_with(weight: torch.Tensor) -> Any:
    return SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_nudge_moves_every_embedding_by_its_last_bit_and_is_taken_back(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (64, 32), generator=generator) * 2 - 1
    weight = ((1 + torch.rand(64, 32, generator=generator)) * signs).to(dtype)
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
    assert difference((reference + off)[:2], reference[:2]) == 0.25  # the upper of two


@pytest.mark.parametrize(
    ("off", "rounding", "passes"),
    [
        (0.099, 0.001, True),
        (0.101, 0.001, False),
        (0.39, 0.2, True),
        (0.41, 0.2, False),
        (0.49, 0.7, True),
        (0.51, 0.7, False),
        (float("nan"), 0.7, False),
    ],
)
def test_what_rounding_does_is_the_measure(off: float, rounding: float, passes: bool) -> None:
    arms = {"unfused": 0.0, "measured": off}
    refused = pytest.raises(VerificationError, match="logits of measured are wrong")
    with nullcontext() if passes else refused:
        confirm(arms, rounding)


class Arm:
    """A model of one embedding, a token a sequence, with an error of its own."""

    def __init__(self, weight: torch.Tensor, batch: int, error: float = 0.0) -> None:
        self.weight, self.batch, self.error = weight, batch, error
        self.turns: list[int] = []

    def first_logits(self, turn: int) -> torch.Tensor:
        self.turns.append(turn)
        found = self.weight[turn * self.batch :][: self.batch].clone()
        found[len(found) // 2 :] += self.error
        return found


@pytest.mark.parametrize(("batch", "turns"), [(1, 8), (3, 3), (8, 1), (9, 1)])
def test_all_arms_run_the_same_eight_sequences_or_more(batch: int, turns: int) -> None:
    weight = torch.rand(16, 100, generator=torch.Generator().manual_seed(0)) + 1
    unfused, fused = Arm(weight, batch), Arm(weight, batch, 0.05)
    differences, rounding = compare(model_with(weight), {"unfused": unfused, "fused": fused})
    assert unfused.turns == [*range(turns)] * 2 and fused.turns == [*range(turns)]
    assert differences["unfused"] == 0 < rounding < 1e-5 < differences["fused"] < 0.05


def test_an_arm_that_is_wrong_in_half_its_sequences_is_wrong() -> None:
    weight = torch.rand(16, 100, generator=torch.Generator().manual_seed(0)) + 1
    with pytest.raises(VerificationError, match="logits of fused are wrong"):
        compare(model_with(weight), {"unfused": Arm(weight, 8), "fused": Arm(weight, 8, 0.5)})


def test_sequences_differ_from_turn_to_turn() -> None:
    batch = object.__new__(Batch)
    batch.start, batch.ids = torch.tensor([[6], [1]]), torch.zeros(2, 1, dtype=torch.long)
    batch.cache, batch._context, batch._vocabulary = SimpleNamespace(layers=[]), 4, 8
    batch.reset(3)
    assert batch.ids.tolist() == [[1], [4]]
    prefill = object.__new__(PrefillRunner)
    prefill._start, prefill._ids, prefill._vocabulary = batch.start, batch.ids, 8
    prefill._function = lambda ids: ids.float()
    prefill.communicator = SimpleNamespace(activate=lambda: None)
    assert [prefill.first_logits(turn).tolist() for turn in (0, 2)] == [[[6], [1]], [[0], [3]]]


def test_logits_of_another_model_are_further_off_than_rounding_may_be() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 8, 1000, generator=generator)
    with pytest.raises(VerificationError):
        confirm({"measured": difference(other, one)}, rounding=10.0)
