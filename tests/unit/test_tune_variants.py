"""A tune measures a backend's variants beside its default, each as a path of its own."""

from __future__ import annotations

import types
from typing import Any

import pytest

from fusewise.backends.base import Backend
from fusewise.backends.shm import OneShot
from fusewise.errors import VerificationError
from fusewise.profiles.schema import Sample
from fusewise.shape import Shape
from fusewise.tune import job
from fusewise.tune.sweep import next_shapes

SHAPE = Shape(4, 64, "float32")


class Varied(OneShot):
    """A backend with two variants that only remembers what was selected."""

    def __init__(self) -> None:
        self.selected = ""
        self.closed = False

    def variants(self, shape: Shape) -> tuple[str, ...]:
        return ("a", "b")

    def select(self, op: Any, shape: Shape, variant: str) -> None:
        self.selected = variant

    def close(self) -> None:
        self.closed = True


class Runner:
    def __init__(self, backend: Backend, op: Any, buffers: Any, variant: str) -> None:
        self.path = f"{backend.path_name(op)}:{variant}".rstrip(":")


def measured_paths(
    monkeypatch: pytest.MonkeyPatch, backend: Varied, wrong: str
) -> tuple[list[str], Any]:
    def verify(one: Varied, *rest: Any, **named: Any) -> None:
        if one.selected == wrong:
            raise VerificationError("wrong")

    def measured(group: Any, runners: Any, op: Any, shape: Shape, rounds: int) -> list[Sample]:
        size = {"num_tokens": shape.num_tokens, "hidden_size": shape.hidden_size}
        return [Sample(op=op, path=r.path, times_us=(1.0,), **size) for r in runners]

    for name, fake in (("verify", verify), ("measured", measured), ("Runner", Runner)):
        monkeypatch.setattr(job, name, fake)
    monkeypatch.setattr(job, "Buffers", lambda *a: None)
    monkeypatch.setattr(job, "taking", lambda worker, candidates, *a: list(candidates))
    silent = types.SimpleNamespace(phase=lambda *a: None, emit=lambda *a, **k: None)
    tune: Any = types.SimpleNamespace(
        worker=silent, group=None, arena=None, candidates=[backend], samples=[], excluded={},
        settings=types.SimpleNamespace(rounds=1), node=types.SimpleNamespace(kind="cpu"),
    )  # fmt: skip
    job._measure_point(tune, "all_reduce", SHAPE)
    return [sample.path for sample in tune.samples], tune


def test_every_variant_is_verified_timed_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Varied()
    paths, tune = measured_paths(monkeypatch, backend, wrong="none")
    assert paths == ["shm.one_shot", "shm.one_shot:a", "shm.one_shot:b"]
    assert [record.name for record in job._records(tune)] == [
        "shm.one_shot",
        "shm.one_shot:a",
        "shm.one_shot:b",
    ]


def test_a_wrong_variant_takes_its_backend_out(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Varied()
    paths, tune = measured_paths(monkeypatch, backend, wrong="b")
    assert (paths, tune.candidates, backend.closed) == ([], [], True)
    assert "shm.one_shot" in tune.excluded


def test_variants_of_one_backend_are_no_change_of_winner() -> None:
    def point(tokens: int, chosen: str) -> Any:
        return types.SimpleNamespace(shape=Shape(tokens, 64), chosen=chosen, medians_us={})

    same: Any = {64: [point(4, "native.one_shot"), point(64, "native.one_shot:v2")]}
    other: Any = {64: [point(4, "native.one_shot"), point(64, "native.two_shot:r2")]}
    assert next_shapes(same, {}) == []
    assert next_shapes(other, {}) == [Shape(16, 64)]
