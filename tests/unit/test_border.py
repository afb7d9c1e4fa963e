"""The border of a call: what goes to a kernel as it is, what is copied, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusewise.backends.native.fp8 import Fp8
from fusewise.errors import InputError
from fusewise.run import runs
from fusewise.run.border import like_these, on_aligned, unknown, usable
from fusewise.run.operators import Communicator
from fusewise.run.runs import Run

CPU = torch.device("cpu")
H = 64


def operands() -> dict[str, torch.Tensor]:
    return {
        "x": torch.zeros(4, H), "weight": torch.nn.Parameter(torch.ones(H), requires_grad=False),
        "residual": torch.zeros(4, H),
    }  # fmt: skip


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "another dtype": lambda t: t.half(),
    "elsewhere": lambda t: t.to("meta"),
    "strided": lambda t: torch.cat([t, t], -1)[..., ::2],
    "shorter": lambda t: t[..., : H - 8].contiguous(),
    "deeper": lambda t: t[None],
    "one number": lambda t: t.flatten()[0],
    "a gradient": lambda t: t.detach().requires_grad_(),
}


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("which", ["weight", "residual"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_only_tensors_that_fit_go_to_a_kernel_as_they_are(
    monkeypatch: pytest.MonkeyPatch, change: str, which: str, remembers: bool
) -> None:
    if not remembers:
        monkeypatch.setattr(runs, "like_these", lambda *tensors: unknown)
    run, given = Run(lambda *_: None, CPU), operands()
    assert run.takes(**given)
    assert run.seen(*given.values()) is remembers
    given[which] = CHANGES[change](given[which])
    assert not run.seen(*given.values())
    assert not run.takes(**given)


def test_a_weight_that_could_record_is_taken_where_nothing_does() -> None:
    run, given = Run(lambda *_: None, CPU), operands()
    given["weight"] = torch.nn.Parameter(torch.ones(H))
    for _ in range(2):
        with torch.no_grad():
            assert run.seen(*given.values()) or run.takes(**given)
        assert not run.seen(*given.values())
        assert not run.takes(**given)


def test_what_was_seen_is_told_from_what_differs_in_one_property() -> None:
    x = torch.zeros(4, H)
    seen = like_these(x)
    assert seen(torch.ones(4, H)) is True
    others = [CHANGES[c](x) for c in CHANGES] + [x[:3], torch.zeros(H, 4).T, x.conj_physical()[:0]]
    assert [seen(other) for other in others] == [False] * len(others)


def test_misaligned_tensors_reach_a_call_that_cannot_take_them_as_copies() -> None:
    flat = torch.arange(H + 1.0)
    got = on_aligned(lambda *given: given)(flat[1:], None, flat[:H], 1e-6)
    assert got[0].data_ptr() % 16 == 0 and torch.equal(got[0], flat[1:])
    assert got[1] is None and got[2] is not flat and got[3] == 1e-6
    assert got[2].data_ptr() == flat.data_ptr()


def test_a_gradient_is_refused_where_it_would_be_recorded() -> None:
    x = torch.zeros(2, H, requires_grad=True)
    with pytest.raises(InputError, match="no gradient: got x that requires one"):
        usable(x, "x", CPU)
    with torch.no_grad():
        assert usable(x, "x", CPU) is x


@pytest.fixture(scope="module")
def alone() -> Iterator[Communicator]:
    """A group of one, which checks what it is given as any other does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Communicator() as made:
            yield made
    finally:
        dist.destroy_process_group()


NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "negative eps": ({"eps": -1}, "eps: expected a finite number >= 0, got -1"),
    "eps that is none": ({"eps": float("nan")}, "got nan"),
    "eps in words": ({"eps": "a"}, "got 'a'"),
    "x in a list": ({"x": [[0.0]]}, "x is no tensor: expected a torch.Tensor, got list"),
    "x of numpy": ({"x": torch.zeros(4, H).numpy()}, "x is no tensor: .* got ndarray"),
    "residual in a list": ({"residual": [[0.0]]}, "residual is no tensor: .* got list"),
    "no weight": ({"weight": None}, "weight is no tensor: .* got NoneType"),
    "fp8 in words": ({"fp8": "static"}, "fp8: expected an Fp8, .* got 'static'"),
    "a scale in words": ({"fp8": Fp8("static"), "static_scale": 1.0}, "static_scale: .* got float"),
}


@pytest.mark.parametrize("name", list(NONSENSE))
def test_nonsense_is_an_input_error_that_says_what_came(alone: Communicator, name: str) -> None:
    given, text = NONSENSE[name]
    with pytest.raises(InputError, match=text):
        alone.all_reduce_rms_norm(**(operands() | given))
    if "x" in given:
        with pytest.raises(InputError, match=text):
            alone.all_reduce(given["x"])


def test_a_residual_that_is_no_tensor_does_not_fit_a_known_shape() -> None:
    assert not Run(lambda *_: None, CPU).takes(**(operands() | {"residual": [[0.0]]}))


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf"), "a", None])
def test_a_bound_that_bounds_nothing_is_refused(timeout_s: Any) -> None:
    with pytest.raises(InputError, match=r"a bound is not positive: .* timeout_s="):
        Communicator(timeout_s=timeout_s)


def test_a_decision_is_about_a_shape(alone: Communicator) -> None:
    with pytest.raises(InputError, match=r"shape: expected a fusewise.Shape, got \(4, 2048\)"):
        alone.decide("all_reduce_rms_norm", (4, 2048))  # type: ignore[arg-type]
