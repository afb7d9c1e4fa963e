"""What the matchers ask of fx nodes: operator names, fake values, token ranges. Changes nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fusewise.graph.decide import TokenRange

if TYPE_CHECKING:
    from torch import Tensor

_CASTS = {"prims::convert_element_type", "aten::_to_copy", "aten::to.dtype"}
_HALVES = {torch.bfloat16, torch.float16}
_FLOATS = _HALVES | {torch.float32, torch.float64}
_VIEWS = {"aten::view", "aten::reshape", "aten::_unsafe_view"}


class UnlikeError(Exception):
    """What stands at a site is unlike what the fused operation computes; the text says how.

    Never leaves this package: a site that raises it stays as it was.
    """


def op_name(node: object) -> str:
    """``"aten::add.Tensor"`` of a call to a torch operator; empty for anything else."""
    target = node.target if isinstance(node, Node) else None
    return operator_name(target) if isinstance(target, OpOverload) else ""


def operator_name(operator: OpOverload) -> str:
    """``"aten::add.Tensor"``; a default overload has no suffix."""
    return str(operator.name())  # type: ignore[no-untyped-call]


def value(node: object) -> Tensor | None:
    """The fake tensor a node stands for; None where it is none or unknown."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument, however it was passed."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def sole_user(node: Node) -> Node | None:
    """The one node that reads this one; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_cast(node: Node, to: torch.dtype | None = None) -> bool:
    """Whether a node only changes a float's width, to ``to`` if given.

    From and to fp8 is no change of width: it is a quantisation, and never skipped.
    """
    if op_name(node) not in _CASTS:
        return False
    before, after = value(node.all_input_nodes[0]), value(node)
    if before is None or after is None or to not in (None, after.dtype):
        return False
    return before.dtype in _FLOATS and after.dtype in _FLOATS


def widened(node: Node, to: torch.dtype | None = None) -> Node:
    """What ``node`` was before exact casts to a wider float, no further back than dtype ``to``."""
    while is_cast(node) and dtype_of(node) != to:
        source = node.all_input_nodes[0]
        if dtype_of(node) != torch.float32 or dtype_of(source) not in (_HALVES | {torch.float32}):
            break
        node = source
    return node


def dtype_of(node: Node) -> torch.dtype | None:
    """The dtype of what a node stands for, where that is a tensor."""
    found = value(node)
    return found.dtype if found is not None else None


def is_row_view(node: Node) -> bool:
    """Whether a node only regroups rows: the last dimension stays what it was."""
    if op_name(node) not in _VIEWS or not isinstance(node.args[0], Node):
        return False
    before, after = value(node.args[0]), value(node)
    if before is None or after is None or before.ndim == 0 or after.ndim == 0:
        return False
    return is_static(before.shape[-1]) and before.shape[-1] == after.shape[-1]


def is_static(size: int | torch.SymInt) -> bool:
    """Whether a dimension is a plain number."""
    return isinstance(size, int)


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dimension by dimension, without asking the solver for a guard."""
    return len(a.shape) == len(b.shape) and all(
        _text(m) == _text(n) for m, n in zip(a.shape, b.shape, strict=True)
    )


def _text(size: int | torch.SymInt) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def shape_text(tensor: Tensor) -> str:
    """``[s0, 4096] bfloat16``."""
    sizes = ", ".join(_text(size) for size in tensor.shape)
    return f"[{sizes}] {dtype_text(tensor.dtype)}"


def dtype_text(dtype: torch.dtype | None) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def others_of(node: Node, one: Node) -> list[Node]:
    """What ``node`` reads beside ``one``."""
    return [read for read in node.all_input_nodes if read is not one]


def token_range(tensor: Tensor) -> TokenRange:
    """Every number of rows the graph may be called with, as the shape environment bounds it."""
    rows: Any = math.prod(tensor.shape[:-1])
    if not isinstance(rows, torch.SymInt):
        return TokenRange(rows, rows)
    bounds = rows.node.shape_env.bound_sympy(rows.node.expr)
    low = int(bounds.lower) if bounds.lower.is_Integer else 0
    high = int(bounds.upper) if bounds.upper.is_Integer else None
    return TokenRange(max(0, low), high)
