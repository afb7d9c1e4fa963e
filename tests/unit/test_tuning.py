"""The pure parts of tuning, and verification against results that are wrong on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusewise.backends.norm import residual_rms_norm
from fusewise.backends.registry import all_ids, baseline_id, ids_for, select
from fusewise.errors import FusewiseError, InputError, VerificationError
from fusewise.operation import ALL_REDUCE_RMS_NORM, backend_of
from fusewise.profiles.plan import decide_points
from fusewise.shape import Shape
from fusewise.tune.operands import integers, normals, usual
from fusewise.tune.sweep import coarse_order, next_shapes
from fusewise.tune.timing import calls_per_round, interleave
from fusewise.tune.verify import check, poisoned_memory, verify
from tests.groups import MirrorGroup
from tests.samples import FUSED, UNFUSED, profile_of


def test_the_grid_spans_the_range_before_it_fills_it() -> None:
    order = coarse_order((2048, 4096), 4096, 2**20, "bfloat16")
    first = [shape.num_tokens for shape in order if shape.hidden_size == 2048]
    assert first[:3] == [1, 16, 256]
    assert sorted(first) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert len(set(order)) == len(order)


class Ordered:
    """A runner that notes who ran before it."""

    calls = 1

    def __init__(self, path: str, trace: list[str]) -> None:
        self.path, self._trace = path, trace
        self.before: Counter[str] = Counter()

    def start(self) -> tuple[float, float]:
        self.before.update(self._trace[-1:])
        self._trace.append(self.path)
        return 0.0, 1.0

    def time_us(self, marks: tuple[float, float]) -> float:
        return marks[1] - marks[0]


def test_no_candidate_always_follows_the_same_other() -> None:
    trace: list[str] = []
    runners: list[Any] = [Ordered(name, trace) for name in "abcdef"]
    times = interleave(MirrorGroup(), runners, rounds=21)
    # A median bears what fewer than half of the rounds suffer.
    assert all(max(runner.before.values()) < 21 / 2 for runner in runners)
    assert {len(column) for column in times.values()} == {21}


def test_bisection_goes_between_neighbours_that_differ_and_stops_when_close() -> None:
    rows = {
        1: {FUSED: 5.0, UNFUSED: 8.0},
        100: {FUSED: 7.0, UNFUSED: 10.0},
        400: {FUSED: 40.0, UNFUSED: 30.0},
    }
    points = decide_points(profile_of(rows))
    assert next_shapes(points, {FUSED: "flashinfer"}) == [Shape(200, 2048)]
    close = {100: rows[100], 110: rows[400]}
    assert next_shapes(decide_points(profile_of(close)), {FUSED: "flashinfer"}) == []
    apart = {100: rows[100], 111: rows[400]}
    middle = next_shapes(decide_points(profile_of(apart)), {FUSED: "flashinfer"})
    assert middle == [Shape(105, 2048)]


def test_bisection_also_follows_an_engines_kernel_that_is_never_chosen() -> None:
    native = "native.one_shot"
    rows = {
        100: {native: 3.0, FUSED: 7.0, UNFUSED: 10.0},
        400: {native: 20.0, FUSED: 40.0, UNFUSED: 30.0},
    }
    points = decide_points(profile_of(rows))
    assert {p.chosen for p in points[2048]} == {native}
    providers = {native: "native", FUSED: "flashinfer"}
    assert next_shapes(points, providers) == [Shape(200, 2048)]
    assert next_shapes(points, {native: "native"}) == []


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_rounds_hold_more_calls_the_smaller_the_message(kind: str) -> None:
    calls = [calls_per_round(kind, Shape(t, 2048)) for t in (1, 64, 1024, 16384)]
    assert calls == sorted(calls, reverse=True)
    assert calls[-1] == 2
    assert calls[0] <= 32


class _Backend:
    """Right by construction, then spoilt by ``spoil``."""

    id = "fake"

    def __init__(self, spoil: Callable[[torch.Tensor], Any]) -> None:
        self.spoil = spoil

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        shape = Shape(x.shape[0], x.shape[1], "bfloat16")
        total = x + integers(shape, 1, x.device, 5)
        self.spoil(total)
        return total

    def all_reduce_rms_norm(self, x: torch.Tensor, residual: Any, weight: Any, *rest: Any) -> Any:
        shape = Shape(x.shape[0], x.shape[1], "bfloat16")
        out, total = residual_rms_norm(x + normals(shape, 1, x.device, 5), residual, weight, *rest)
        self.spoil(out)
        return out, total


SHAPE = Shape(4, 64)
SPOILS: dict[str, Callable[[torch.Tensor], Any]] = {
    "one element": lambda t: t[-1, -1].add_(1.0),
    "not a number": lambda t: t[0, 0].fill_(float("nan")),
    "not written": lambda t: t.copy_(torch.empty_like(t)),
    "infinite": lambda t: t[1, 1].fill_(float("inf")),
}


@pytest.mark.parametrize("how", SPOILS)
def test_verification_counts_what_is_wrong(how: str) -> None:
    for case in (usual("all_reduce", SHAPE, 5), usual("all_reduce_rms_norm", SHAPE, 5)):
        good = check(_Backend(lambda t: None), MirrorGroup(), case)  # type: ignore[arg-type]
        assert good.wrong == 0
        bad = check(_Backend(SPOILS[how]), MirrorGroup(), case)  # type: ignore[arg-type]
        assert bad.wrong > 0
        assert bad.bits != good.bits
        with pytest.raises(VerificationError, match="is wrong"):
            verify(_Backend(SPOILS[how]), MirrorGroup(), case)  # type: ignore[arg-type]


def test_a_systematic_error_below_every_elements_budget_is_still_wrong() -> None:
    drifting = _Backend(lambda t: t.mul_(1.012))
    case = usual("all_reduce_rms_norm", SHAPE, 5)
    assert check(drifting, MirrorGroup(), case).wrong > 0  # type: ignore[arg-type]


def test_an_input_that_changes_is_wrong() -> None:
    class Overwrites(_Backend):
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            out = super().all_reduce(x)
            x.copy_(out)
            return out

    case = usual("all_reduce", SHAPE, 5)
    assert check(Overwrites(lambda t: None), MirrorGroup(), case).wrong > 0  # type: ignore[arg-type]


def test_ranks_with_other_bits_are_told_apart() -> None:
    other = [{"wrong": 0, "relative_error": 0.0, "bits": (1, 2)}]
    with pytest.raises(VerificationError, match="differs between ranks"):
        verify(
            _Backend(lambda t: None),  # type: ignore[arg-type]
            MirrorGroup(other=other),  # type: ignore[arg-type]
            usual("all_reduce", SHAPE, 5),
        )


def test_memory_is_poisoned_inside_and_only_inside() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_sums_of_the_integers_are_exact_in_the_narrowest_dtype_for_sixteen_ranks() -> None:
    parts = [integers(Shape(64, 64), rank, torch.device("cpu"), 1) for rank in range(16)]
    assert parts[0].dtype == torch.bfloat16
    total = torch.stack(parts).double().sum(0)
    assert total.abs().max() < 256
    assert bool((total.to(torch.bfloat16).double() == total).all())


def test_the_norm_matches_torchs_own() -> None:
    x, residual = torch.randn(3, 64), torch.randn(3, 64)
    weight = torch.randn(64)
    out, total = residual_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(out, torch.rms_norm(x + residual, (64,), weight, 1e-5))
    exact = ALL_REDUCE_RMS_NORM.reference([x], residual, weight, 1e-5, 1.0)
    gemma = residual_rms_norm(x, residual, weight, 1e-5, 1.0)
    torch.testing.assert_close(gemma[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    assert residual_rms_norm(x, None, weight, 1e-5)[1] is x
    torch.testing.assert_close(total, x + residual)


def test_names_of_backends_and_providers() -> None:
    flashinfer = {"flashinfer.one_shot", "flashinfer.two_shot", "flashinfer.mnnvl"}
    assert select(["flashinfer"]) == flashinfer
    assert select(["native.one_shot", "nccl"]) == {"native.one_shot", "nccl"}
    assert select([]) == set()
    assert baseline_id("cuda") == ids_for("cuda")[0] == "nccl"
    assert baseline_id("cpu") == "gloo"
    assert set(ids_for("cuda")) | set(ids_for("cpu")) == set(all_ids())
    assert baseline_id("shared") == "gloo"
    assert set(ids_for("shared")) == {"gloo", *ids_for("cuda")}
    assert (backend_of(UNFUSED), backend_of(FUSED)) == ("nccl", FUSED)
    with pytest.raises(InputError, match=r"Did you mean native\.one_shot"):
        select(["native.oneshot"])


def test_an_error_says_expected_got_and_what_to_do() -> None:
    error = FusewiseError("it broke", expected="a", got="b", hint="Do c.")
    assert str(error) == "it broke: expected a, got b. Do c."
    assert str(FusewiseError("it broke")) == "it broke"
    codes = {kind.__name__: kind.exit_code for kind in _tree(FusewiseError)}
    assert codes["InputError"] == 2
    assert codes["WorkspaceError"] == codes["UnavailableError"] == 3
    assert codes["RankTimeoutError"] == codes["DisagreementError"] == 4
    assert codes["StaleProfileError"] == codes["ProfileError"] == 5
    assert codes["VerificationError"] == 6


def _tree(kind: type[FusewiseError]) -> list[type[FusewiseError]]:
    return [kind, *(deeper for sub in kind.__subclasses__() for deeper in _tree(sub))]
