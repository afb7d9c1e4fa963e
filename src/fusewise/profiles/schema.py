"""The profile: what was measured on one node. Its JSON schema, its validation, its provenance.

A profile holds observations only; what to do about them is ``plan.derive(profile)``. Reading one
validates everything once, here, and names the JSON path of the first fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fusewise.errors import ProfileError
from fusewise.node import Fingerprint
from fusewise.operation import PATH_PATTERN, Op, backend_of
from fusewise.shape import DType, Shape

SCHEMA_VERSION = 1
REPLACE_HINT = "Measure again with `fusewise tune`, or name another profile."
MAX_PROFILE_BYTES = 16 * 2**20  # a full tune is near 300 KB; more than this is not a profile

TimeUs = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]
PathName = Annotated[str, Field(pattern=PATH_PATTERN)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Numerics(_Record):
    """Where a path rounds. Two paths of one class may replace each other silently; others not.

    ``accumulation``: type of the partial sums. ``order``: ``rank`` (fixed, the same on all ranks)
    or ``algorithm`` (the library's own). ``rounds_sum``: the reduced sum is rounded to the
    tensor's dtype before the residual is added.
    """

    accumulation: Literal["float32", "input"]
    order: Literal["rank", "algorithm"]
    rounds_sum: bool


class PathRecord(_Record):
    """One way to compute the operation, as it was measured."""

    name: PathName
    provider: str = Field(min_length=1, max_length=60)
    fused: bool
    numerics: Numerics | None = None


class Sample(_Record):
    """Timings of one path at one shape; ``times_us[i]`` of every path come from round ``i``.

    Each time is one call, the maximum over ranks. A published number has a single entry.
    """

    op: Op = "all_reduce_rms_norm"
    path: PathName
    num_tokens: int = Field(ge=1, le=2**32)
    hidden_size: int = Field(ge=1, le=2**24)
    times_us: tuple[TimeUs, ...] = Field(min_length=1, max_length=1001)


class PublishedDelta(_Record):
    """unfused − fused as a publication prints it, where that has more digits than its times."""

    num_tokens: int = Field(ge=1, le=2**32)
    hidden_size: int = Field(ge=1, le=2**24)
    fused: PathName
    unfused: PathName
    delta_us: float = Field(gt=-1e9, lt=1e9, allow_inf_nan=False)


class PublishedCrossover(_Record):
    """A crossover a publication states for a hidden size without printing its samples."""

    hidden_size: int = Field(ge=1, le=2**24)
    message_bytes: int = Field(ge=1, lt=2**62)


class Exclusion(_Record):
    """A backend that was not timed, and why. Once written as ``path``; read as either."""

    backend: str = Field(
        min_length=1, max_length=80, validation_alias=AliasChoices("backend", "path")
    )
    reason: str = Field(min_length=1, max_length=2000)


class Provenance(_Record):
    """Where the numbers come from. ``extends``: date of the profile whose points this one kept."""

    origin: Literal["measured", "published"]
    source: str = Field(min_length=1, max_length=2000)
    created: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}:\d{2}Z)?$")
    fusewise: str = Field(min_length=1, max_length=40)
    method: str = Field(default="", max_length=2000)
    duration_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    extends: str | None = Field(default=None, min_length=1, max_length=40)


class Profile(_Record):
    """Everything measured on one node for one dtype."""

    schema_version: Literal[1] = 1
    provenance: Provenance
    fingerprint: Fingerprint
    dtype: DType
    baseline: PathName
    paths: tuple[PathRecord, ...] = Field(min_length=1, max_length=64)
    samples: tuple[Sample, ...] = Field(min_length=1, max_length=20_000)
    excluded: tuple[Exclusion, ...] = Field(default=(), max_length=200)
    deltas: tuple[PublishedDelta, ...] = Field(default=(), max_length=2000)
    crossovers: tuple[PublishedCrossover, ...] = Field(default=(), max_length=200)

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        names = {path.name for path in self.paths}
        if len(names) != len(self.paths):
            raise ValueError("paths: a name occurs twice")
        seen: set[tuple[str, str, int, int]] = set()
        for i, sample in enumerate(self.samples):
            base = sample.path if sample.op == "all_reduce_rms_norm" else None
            if base is not None and base not in names:
                raise ValueError(f"samples[{i}].path: {base!r} is not among paths")
            key = (sample.op, sample.path, sample.num_tokens, sample.hidden_size)
            if key in seen:
                raise ValueError(f"samples[{i}]: {key} was measured twice")
            seen.add(key)
        for delta in self.deltas:
            for name in (delta.fused, delta.unfused):
                if name not in names:
                    raise ValueError(f"deltas: {name!r} is not among paths")
        self._same_round_counts()
        return self

    def _same_round_counts(self) -> None:
        rounds: dict[tuple[str, int, int], int] = {}
        for i, sample in enumerate(self.samples):
            point = (sample.op, sample.num_tokens, sample.hidden_size)
            if rounds.setdefault(point, len(sample.times_us)) != len(sample.times_us):
                raise ValueError(
                    f"samples[{i}].times_us: {len(sample.times_us)} rounds where other paths at "
                    f"this shape have {rounds[point]}; rounds are paired"
                )

    @property
    def file_name(self) -> str:
        """``device=NVIDIA_H200,tp=2,dtype=bfloat16,fabric=nv18.json``."""
        mark = self.fingerprint
        return profile_file_name(mark, self.dtype)

    def path(self, name: str) -> PathRecord:
        """The record of a path.

        Raises:
            KeyError: no such path.
        """
        return next_path(self.paths, name)

    def without(self, backends: Collection[str]) -> Profile | None:
        """The same observations less those of some backends; None when nothing is left.

        Crossovers that a publication states go too: they were stated with those paths present.

        Args:
            backends: backend ids, such as ``native.one_shot``.
        """
        kept = tuple(s for s in self.samples if backend_of(s.path) not in backends)
        if len(kept) == len(self.samples):
            return self
        if not kept:
            return None
        names = {sample.path for sample in kept}
        paths = tuple(path for path in self.paths if path.name in names)
        deltas = tuple(d for d in self.deltas if {d.fused, d.unfused} <= names)
        return self.model_copy(
            update={
                "samples": kept,
                "paths": paths or self.paths,
                "deltas": deltas,
                "crossovers": (),
            }
        )

    def points(self, op: Op = "all_reduce_rms_norm") -> dict[int, dict[Shape, dict[str, Sample]]]:
        """Samples as hidden_size → shape (ascending) → path name → sample."""
        table: dict[int, dict[Shape, dict[str, Sample]]] = {}
        chosen = [s for s in self.samples if s.op == op]
        for sample in sorted(chosen, key=lambda s: (s.hidden_size, s.num_tokens)):
            shape = Shape(sample.num_tokens, sample.hidden_size, self.dtype)
            table.setdefault(sample.hidden_size, {}).setdefault(shape, {})[sample.path] = sample
        return table

    def to_json(self) -> str:
        """The profile as it is stored: one line per sample, for people and for diffs."""
        document = self.model_dump(mode="json", exclude_none=True)
        lists = ("paths", "samples", "excluded", "deltas", "crossovers")
        head = {key: value for key, value in document.items() if key not in lists}
        body = json.dumps(head, indent=1)[:-2]
        for key in lists:
            rows = ",\n  ".join(json.dumps(row) for row in document[key])
            body += f',\n "{key}": [\n  {rows}\n ]' if rows else f',\n "{key}": []'
        return body + "\n}\n"


def next_path(paths: tuple[PathRecord, ...], name: str) -> PathRecord:
    """The path of that name; KeyError without one."""
    for path in paths:
        if path.name == name:
            return path
    raise KeyError(name)


def profile_file_name(mark: Fingerprint, dtype: DType) -> str:
    """The file name under which a node's profile is kept; vLLM's tuned configs look alike."""
    device = re.sub(r"[^A-Za-z0-9.-]+", "_", mark.device).strip("_")
    fabric = mark.fabric + ("-multicast" if mark.multicast else "")
    nodes = f",nodes={mark.nodes}" if mark.nodes > 1 else ""
    return f"device={device},tp={mark.world_size}{nodes},dtype={dtype},fabric={fabric}.json"


def parse_profile(text: str, where: str) -> Profile:
    """A profile from its JSON text.

    Args:
        text: the file's content.
        where: the file's name, for the message.

    Raises:
        ProfileError: not JSON, another schema version, or a field out of range; the message
            carries the JSON path of the first fault.
    """
    if len(text) > MAX_PROFILE_BYTES:
        raise ProfileError(
            f"{where} is no profile", expected=f"at most {MAX_PROFILE_BYTES} bytes", got="more"
        )
    try:
        document: Any = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_once_each
        )
    except (ValueError, RecursionError) as error:
        raise ProfileError(
            f"{where} is not valid JSON", got=str(error), hint=REPLACE_HINT
        ) from error
    if not isinstance(document, dict):
        got = type(document).__name__
        raise ProfileError(f"{where} is no profile", expected="a JSON object", got=got)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ProfileError(
            f"{where} at $.schema_version",
            expected=str(SCHEMA_VERSION),
            got=repr(version),
            hint=REPLACE_HINT,
        )
    try:
        return Profile.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault["loc"])
        raise ProfileError(
            f"{where} at ${place}",
            **_told(fault["msg"], fault["input"]),
            hint=REPLACE_HINT,
        ) from error


def _told(message: str, got: object) -> dict[str, str]:
    wanted = message.removeprefix("Input should be ")
    return {"got": message} if wanted == message else {"expected": wanted, "got": f"{got!r:.80}"}


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a measurement")
