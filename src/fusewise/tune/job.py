"""The tune as one rank runs it, inside a killable child: build, examine, sweep, report.

Rank 0 decides what to measure next and when the budget is spent; the others follow. Every step
names the backend whose code runs, so that the supervisor can tell whose fault a silence is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import fusewise
from fusewise.backends.registry import baseline_id, ids_for, select
from fusewise.errors import UnavailableError, VerificationError
from fusewise.node import HARDWARE, SOFTWARE
from fusewise.operation import Op, backend_of, unfused_path, variant_of
from fusewise.profiles.match import as_it_counts
from fusewise.profiles.merge import LEFT_OUT, extended
from fusewise.profiles.plan import decide_points
from fusewise.profiles.schema import (
    Exclusion,
    PathRecord,
    Profile,
    Provenance,
    Sample,
    parse_profile,
)
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.shape import Shape
from fusewise.tune.candidates import BUILD_S, STEP_S, build_all, taking
from fusewise.tune.operands import usual
from fusewise.tune.probe import examine
from fusewise.tune.settings import Settings
from fusewise.tune.sweep import coarse_order, next_shapes
from fusewise.tune.timing import Arena, Buffers, Runner, measured
from fusewise.tune.verify import verify

if TYPE_CHECKING:
    from fusewise.backends.base import Backend
    from fusewise.node import Fingerprint
    from fusewise.ranks.worker import Worker

_BISECTIONS = 6
_METHOD = (
    "verified per shape; {rounds} interleaved rounds, max over ranks, paired medians; "
    "CUDA graphs on GPUs, batched calls on CPUs; inputs rotated"
)


@dataclass
class Tune:
    """The state of one tune on one rank."""

    worker: Worker
    group: Group
    settings: Settings
    node: Fingerprint
    arena: Arena
    candidates: list[Backend] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    known: Profile | None = None  # of this node, measured before; on rank 0 only
    done: int = 0
    planned: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def baseline(self) -> str:
        """The path everything is compared with."""
        return unfused_path(baseline_id(self.node.kind))

    @property
    def left_s(self) -> float:
        """Of the budget; below zero once it is spent."""
        return self.settings.budget_s - (time.monotonic() - self.began_s)


def tune_rank(worker: Worker, request: dict[str, Any]) -> str | None:
    """The job: returns the profile's JSON on rank 0, None elsewhere."""
    settings = Settings(**request["settings"])
    group = Group(timeout_s=settings.timeout_s)
    arena = Arena(group, settings.max_shape)
    tune = Tune(worker, group, settings, fingerprint_of(group), arena)
    tune.excluded |= request["excluded"]
    if group.rank == 0:
        tune.known = _same_node(tune, request.get("known"))
    _build(tune)
    _sweep(tune)
    # Closing is collective: after a failure this process simply ends, and takes its memory along.
    for backend in tune.candidates:
        backend.close()
    return _profile(tune).to_json() if group.rank == 0 else None


def _build(tune: Tune) -> None:
    """Builds and examines every candidate; what fails on any rank is excluded on all."""
    settings = tune.settings
    left_out = select(settings.without) & set(ids_for(tune.node.kind))
    unwanted = left_out | tune.excluded.keys()
    tune.excluded |= dict.fromkeys(left_out, LEFT_OUT)
    for backend_id, backend, failed in build_all(
        tune.worker, tune.group, tune.node, settings.max_shape, unwanted
    ):
        if backend is None:
            _exclude(tune, backend_id, failed)
            continue
        tune.worker.phase(f"verify {backend_id}", backend_id, BUILD_S)
        try:
            examine(backend, tune.arena, min(settings.hidden_sizes), settings.dtype)
        except VerificationError as error:
            backend.close()
            _exclude(tune, backend_id, str(error))
        else:
            tune.candidates.append(backend)
            tune.worker.emit("ready", path=backend.path_name())


def _exclude(tune: Tune, backend_id: str, reason: str) -> None:
    if backend_id == baseline_id(tune.node.kind):
        raise UnavailableError(f"the baseline {backend_id} does not work here", got=reason)
    tune.excluded[backend_id] = reason
    tune.worker.emit("excluded", backend=backend_id, reason=reason)


def _same_node(tune: Tune, document: str | None) -> Profile | None:
    """The profile to extend, if it is of this very node."""
    if not document:
        return None
    known = parse_profile(document, "the profile to extend")
    other = known.fingerprint.differences(tune.node, (*HARDWARE, *SOFTWARE))
    if other or (known.dtype, known.baseline) != (tune.settings.dtype, tune.baseline):
        return None
    return as_it_counts(known, tune.node, "the profile to extend")[0]


def _sweep(tune: Tune) -> None:
    """What nobody measured yet, then between what differs, then the rest anew."""
    settings = tune.settings
    grid = coarse_order(
        settings.hidden_sizes, settings.min_bytes, settings.max_bytes, settings.dtype
    )
    first = settings.hidden_sizes[0]
    todo: list[tuple[Op, Shape]] = [("all_reduce_rms_norm", shape) for shape in grid]
    todo += [("all_reduce", shape) for shape in grid if shape.hidden_size == first]
    samples = tune.known.samples if tune.known else ()
    mine = [[s.op, s.num_tokens, s.hidden_size] for s in samples]
    known = {tuple(point) for point in tune.group.broadcast("known", mine)}
    again = [one for one in todo if _point(*one) in known]
    fresh = [one for one in todo if one not in again]
    tune.planned = len(todo)
    _ = _measure(tune, fresh) and _bisect(tune) and _measure(tune, again)
    reached = known | {(s.op, s.num_tokens, s.hidden_size) for s in tune.samples}
    missed = [_point(*one) for one in todo if _point(*one) not in reached]
    tune.worker.emit("unreached", points=missed, planned=len(todo))


def _point(op: Op, shape: Shape) -> tuple[str, int, int]:
    return op, shape.num_tokens, shape.hidden_size


def _bisect(tune: Tune) -> bool:
    """Narrows every change of winner; False once the budget is spent."""
    for _ in range(_BISECTIONS):
        shapes = [Shape(*shape) for shape in tune.group.broadcast("bisect", _midpoints(tune))]
        tune.planned += len(shapes)
        if not shapes:
            break
        if not _measure(tune, [("all_reduce_rms_norm", s) for s in shapes]):
            return False
    return True


def _midpoints(tune: Tune) -> list[tuple[int, int, str]]:
    if tune.group.rank or not (tune.samples or tune.known):
        return []
    profile = _profile(tune) if tune.samples else tune.known
    assert profile is not None
    if tune.known and tune.samples:
        profile = extended(tune.known, profile)
    fused = {path.name: path.provider for path in profile.paths if path.fused}
    settings = tune.settings
    return [
        (shape.num_tokens, shape.hidden_size, shape.dtype)
        for shape in next_shapes(decide_points(profile), fused)
        if shape.hidden_size in settings.hidden_sizes
        and settings.min_bytes <= shape.message_bytes <= settings.max_bytes
    ]


def _measure(tune: Tune, todo: Sequence[tuple[Op, Shape]]) -> bool:
    """Measures in order until done or the budget is spent; False once it is."""
    for op, shape in todo:
        left_s = tune.left_s
        # Two points make a plan; without them there is nothing to report.
        enough = len({s.num_tokens for s in tune.samples}) >= 2
        if tune.group.broadcast("budget", left_s < 0 and enough):
            return False
        tune.worker.emit(
            "progress", done=tune.done, planned=tune.planned, op=op, shape=str(shape),
            left_s=max(0.0, left_s),
        )  # fmt: skip
        _measure_point(tune, op, shape)
        tune.done += 1
    return True


def _measure_point(tune: Tune, op: Op, shape: Shape) -> None:
    group, runners = tune.group, []
    buffers = Buffers(tune.arena, shape)
    for backend in taking(tune.worker, tune.candidates, op, shape):
        variants = ("", *backend.variants(shape))
        try:
            for variant in variants:
                backend.select(op, shape, variant)
                verify(backend, group, usual(op, shape, shape.num_tokens))
        except VerificationError as error:
            _quarantine(tune, backend, str(error))
            continue
        runners += [Runner(backend, op, buffers, variant) for variant in variants]
    tune.worker.phase(f"time {op} {shape}", None, STEP_S)
    tune.samples += measured(group, runners, op, shape, tune.settings.rounds)


def _quarantine(tune: Tune, backend: Backend, reason: str) -> None:
    """Wrong once is out: its earlier timings go too."""
    _exclude(tune, backend.id, reason)
    tune.candidates.remove(backend)
    tune.samples = [one for one in tune.samples if backend_of(one.path) != backend.id]
    backend.close()


def _records(tune: Tune) -> Iterator[PathRecord]:
    """Every candidate's own path, then those of its variants that were measured."""
    measured = {one.path for one in tune.samples if variant_of(one.path)}
    for backend in tune.candidates:
        yield (record := backend.record())
        for path in sorted(measured):
            if backend_of(path) == backend.id:
                yield record.model_copy(update={"name": path})


def _profile(tune: Tune) -> Profile:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Profile(
        provenance=Provenance(
            origin="measured",
            source="fusewise tune",
            created=now,
            fusewise=fusewise.__version__,
            method=_METHOD.format(rounds=tune.settings.rounds),
            duration_s=round(time.monotonic() - tune.began_s, 1),
        ),
        fingerprint=tune.node,
        dtype=tune.settings.dtype,
        baseline=tune.baseline,
        paths=tuple(_records(tune)),
        samples=tuple(tune.samples),
        excluded=tuple(
            Exclusion(backend=backend, reason=reason[:2000])
            for backend, reason in tune.excluded.items()
        ),
    )
