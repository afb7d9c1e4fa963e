"""One record per operation, and the names of the ways to compute it.

A path's name is made and taken apart here only: ``flashinfer.one_shot`` (one kernel does it all),
``native.one_shot:early`` (a variant of one), ``nccl + rms_norm`` (an all-reduce, then an epilogue).
Pure; imports no torch: references use tensors' own methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fusewise.errors import InputError

Op = Literal["all_reduce_rms_norm", "all_reduce"]

_JOINT = " + "  # between an all-reduce and what follows it
_COLON = ":"  # between a backend and its variant


@dataclass(frozen=True)
class Operation:
    """What is computed on every rank.

    Attributes:
        name: as in profiles, operators and ``--op``.
        epilogue: what an unfused path runs behind the all-reduce; empty where nothing follows.
        operands: tensors beside ``x``, by the names the communicator gives them.
        reference: every rank's inputs, then ``operands``, ``eps`` and ``weight_bias`` → the exact
            results in float64.
    """

    name: Op
    epilogue: str
    operands: tuple[str, ...]
    reference: Callable[..., tuple[Any, ...]]

    @property
    def fusable(self) -> bool:
        """Whether one kernel can do more than the all-reduce."""
        return bool(self.epilogue)

    @property
    def suffix(self) -> str:
        """What an unfused path's name ends in."""
        return f"{_JOINT}{self.epilogue}" if self.epilogue else ""


def _sum(inputs: list[Any]) -> tuple[Any]:
    total = inputs[0].double()
    for x in inputs[1:]:
        total = total + x
    return (total,)


def _sum_norm(
    inputs: list[Any], residual: Any, weight: Any, eps: float, weight_bias: float = 0.0
) -> tuple[Any, Any]:
    (total,) = _sum(inputs)
    if residual is not None:
        total = total + residual
    scale = (total.square().mean(-1, keepdim=True) + eps).rsqrt()
    return total * scale * (weight.double() + weight_bias), total


ALL_REDUCE = Operation("all_reduce", "", (), _sum)
ALL_REDUCE_RMS_NORM = Operation(
    "all_reduce_rms_norm", "rms_norm", ("residual", "weight"), _sum_norm
)
OPERATIONS: dict[Op, Operation] = {one.name: one for one in (ALL_REDUCE_RMS_NORM, ALL_REDUCE)}
assert tuple(OPERATIONS) == get_args(Op)


def known_op(name: str) -> Op:
    """The operation of that name.

    Raises:
        InputError: there is none.
    """
    for op in OPERATIONS:
        if op == name:
            return op
    raise InputError("unknown operation", expected=" or ".join(OPERATIONS), got=repr(name))


_EPILOGUES = "|".join(one.epilogue for one in OPERATIONS.values() if one.epilogue)
PATH_PATTERN = rf"^[a-z0-9_.]{{1,60}}(:[a-z0-9_.]{{1,40}})?( \+ ({_EPILOGUES}))?$"


def unfused_path(backend_id: str, op: Op = "all_reduce_rms_norm") -> str:
    """``nccl`` → ``nccl + rms_norm``; for a plain all-reduce its own name."""
    return backend_id + OPERATIONS[op].suffix


def variant_path(backend_id: str, variant: str) -> str:
    """``native.one_shot`` and ``early`` → ``native.one_shot:early``; the default has no name."""
    return f"{backend_id}{_COLON}{variant}" if variant else backend_id


def all_reduce_of(path: str) -> str:
    """What does the all-reduce in a path: ``nccl + rms_norm`` → ``nccl``."""
    return path.partition(_JOINT)[0]


def backend_of(path: str) -> str:
    """The backend's id in a path, without variant and epilogue."""
    return all_reduce_of(path).partition(_COLON)[0]


def variant_of(path: str) -> str:
    """The variant in a path; empty for the backend's default."""
    return all_reduce_of(path).partition(_COLON)[2]


def is_unfused(path: str) -> bool:
    """Whether a path runs an epilogue of its own behind an all-reduce."""
    return _JOINT in path
