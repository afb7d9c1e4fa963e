"""Recognises RMSNorms that are one operation: torch's own and vLLM's. Changes nothing.

vLLM's in-place operations (``_C.rms_norm``, ``_C.fused_add_rms_norm``) appear as torch
functionalises them: ``auto_functionalized`` in its first or second form, whose results are the
mutated arguments behind the operation's own, empty, result.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from fusewise.graph.nodes import UnlikeError, argument, op_name, operator_name

_USED_ELSEWHERE = "an intermediate of the norm is used elsewhere"
_NORMS = {"aten::rms_norm": "input", "aten::_fused_rms_norm": "input", "vllm_ir::rms_norm": "x"}
_PARTIAL = "the norm's variance covers a part of the row"


@dataclass(frozen=True)
class Norm:
    """``out = rms_norm(x) · (weight + weight_bias)``; ``inner`` are its nodes, ``out`` last.

    Without a weight ``out`` is the normalised row; what multiplies it stays in the graph.
    """

    out: Node
    weight: Node | None
    eps: float
    weight_bias: float
    inner: tuple[Node, ...]


@dataclass(frozen=True)
class AddNorm:
    """A norm that adds ``residual`` first; ``total`` is the node that reads the sum, or None."""

    norm: Norm
    residual: Node
    total: Node | None


def one_operation(x: Node, user: Node) -> Norm | None:
    """The norm of ``x`` that ``user`` is; None if it is none.

    Raises:
        UnlikeError: it is one that ours does not reproduce.
    """
    name = op_name(user)
    if name in _NORMS and argument(user, 0, _NORMS[name]) is not x:
        return None  # it is the weight of somebody else's norm
    if name in ("aten::rms_norm", "aten::_fused_rms_norm"):
        if len(argument(user, 1, "normalized_shape")) != 1:
            raise UnlikeError("the norm spans several dimensions")
        out = user if name == "aten::rms_norm" else read_items(user, 0)[0]
        return _norm(out, argument(user, 2, "weight"), argument(user, 3, "eps"), user)
    if name == "vllm_ir::rms_norm":
        if argument(user, 3, "variance_size") is not None:
            raise UnlikeError(_PARTIAL)
        return _norm(user, argument(user, 1, "weight"), argument(user, 2, "epsilon"), user)
    call = functionalised(user)
    if call is None or call.name != "_C::rms_norm" or call.arguments["input"] is not x:
        return None
    out = read_items(user, call.results["result"])[0]
    return _norm(out, call.arguments["weight"], call.arguments["epsilon"], user)


def add_norm(x: Node, user: Node) -> AddNorm | None:
    """The residual-add + norm of ``x`` that ``user`` is; None if it is none.

    Raises:
        UnlikeError: it is one that ours does not reproduce.
    """
    if op_name(user) == "vllm_ir::fused_add_rms_norm":
        if argument(user, 4, "variance_size") is not None:
            raise UnlikeError(_PARTIAL)
        operands = argument(user, 0, "x"), argument(user, 1, "x_residual")
        weight, eps = argument(user, 2, "weight"), argument(user, 3, "epsilon")
        results = (0, 1)
    else:
        call = functionalised(user)
        if call is None or call.name != "_C::fused_add_rms_norm":
            return None
        operands = call.arguments["input"], call.arguments["residual"]
        weight, eps = call.arguments["weight"], call.arguments["epsilon"]
        results = call.results["input"], call.results["residual"]
    if x not in operands:
        return None
    if operands == (x, x):
        raise UnlikeError("the reduced tensor is its own residual")
    out, *total = read_items(user, *results)
    residual = operands[1] if operands[0] is x else operands[0]
    return AddNorm(_norm(out, weight, eps, user), residual, total[0] if total else None)


def _norm(out: Node, weight: Node | None, eps: Any, call: Node) -> Norm:
    if isinstance(eps, Node):
        raise UnlikeError("eps is a graph input")
    if not isinstance(eps, float):
        raise UnlikeError("eps is not given")  # torch's default depends on its version
    return Norm(out, weight, eps, 0.0, (call,) if out is call else (call, out))


def read_items(node: Node, first: int, *others: int) -> list[Node]:
    """The readers of a tuple's items: of ``first``, then of those of ``others`` that are read."""
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(items) != len(node.users) or first not in items or {*items} - {first, *others}:
        raise UnlikeError(_USED_ELSEWHERE)
    return [items[index] for index in (first, *others) if index in items]


@dataclass(frozen=True)
class Call:
    """A functionalised in-place call: its arguments by name, and where each mutated one returns."""

    name: str
    arguments: dict[str, Any]
    results: dict[str, int]


def functionalised(node: Node) -> Call | None:
    """The in-place call that torch turned into ``node``; None if it is none, or on a part."""
    name = getattr(node.target, "__name__", "")
    if name not in ("auto_functionalized", "auto_functionalized_v2"):
        return None
    target = node.args[0]
    if not isinstance(target, OpOverload):
        return None
    schema = target._schema
    mutated = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    first = max(1, len(schema.returns))
    if name == "auto_functionalized":
        results = {key: first + i for i, key in enumerate(mutated)}
        return Call(operator_name(target), dict(node.kwargs), results)
    arguments = {key: given for key, given in node.kwargs.items() if not key.startswith("_")}
    bases: Any = node.kwargs["_all_bases"]
    results = {}
    for key in mutated:
        how = {k for k in node.kwargs if k.startswith(f"_{key}_")}
        if how - {f"_{key}_base_index", f"_{key}_alias"}:
            return None  # a part of its base: what is read is not the base itself
        index: Any = node.kwargs[f"_{key}_base_index"]
        arguments[key], results[key] = bases[index], first + index
    return Call(operator_name(target), arguments, results)
