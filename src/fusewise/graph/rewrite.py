"""Puts the fused operation, or our all-reduce, in the place of a matched site."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import fusewise.run.operators  # noqa: F401  registers torch.ops.fusewise
from fusewise.graph.collectives import Reduction
from fusewise.graph.nodes import dtype_of, value
from fusewise.graph.quantisers import Quantiser
from fusewise.graph.sites import Match
from fusewise.graph.sums import Term

if TYPE_CHECKING:
    from collections.abc import Iterable

aten = torch.ops.aten


def fuse(graph: Graph, found: Match, group: str, fp8: bool = False) -> None:
    """Replaces a site by ``fusewise.all_reduce_rms_norm``, which runs what the plan says.

    Readers of the norm get its first result, readers of the sum its second. Nodes of the site
    that are read by nothing else disappear. With ``fp8`` the match's quantiser goes along.
    """
    norm, reductions = found.norm, found.parts.reductions
    x = found.parts.terms[0].node
    weight = norm.weight or _ones(graph, x, found.dtype)
    inputs = [t for t in found.parts.terms if t.reduction is not None]
    with graph.inserting_before(found.anchor):
        operands = _sum(graph, inputs, found.dtype), _sum(graph, found.addends, found.dtype)
        inputs_of_norm = (*operands, weight, norm.eps, norm.weight_bias)
        quantiser = found.quantiser if fp8 else None
        if quantiser is not None:
            out, kept = _quantised(graph, quantiser, inputs_of_norm, len(norm.out.users) > 1, group)
        else:
            operation = torch.ops.fusewise.all_reduce_rms_norm.default
            fused = _call(graph, operation, (*inputs_of_norm, group))
            out, kept = (_call(graph, operator.getitem, (fused, i)) for i in range(2))
        out = _cast(graph, out, dtype_of(norm.out))
    norm.out.replace_all_uses_with(out)
    for total in found.totals:
        total.replace_all_uses_with(kept)
    calls = [call for reduction in reductions for call in reduction.calls]
    # Of everything that led here, what nothing reads any more; readers before what they read.
    also = quantiser.inner if quantiser is not None else ()
    old = {*norm.inner, *found.totals, *found.parts.inner, *calls, *also}
    _erase_unread(graph, (*sorted(old, reverse=True), kept, out))


def _quantised(
    graph: Graph, quantiser: Quantiser, inputs: tuple[Any, ...], keep_norm: bool, group: str
) -> tuple[Node, Node]:
    """The operation with its quantiser, whose readers get its results; returns norm and sum."""
    how = (quantiser.scaling, quantiser.static_scale, keep_norm, group)
    operation = torch.ops.fusewise.all_reduce_rms_norm_fp8.default
    fused = _call(graph, operation, (*inputs, *how))
    fp8, scales, kept, norm = (_call(graph, operator.getitem, (fused, i)) for i in range(4))
    quantiser.quantised.replace_all_uses_with(fp8)
    if quantiser.scales is not None:
        quantiser.scales.replace_all_uses_with(scales)
    _erase_unread(graph, (scales,))
    return norm, kept


def replace_all_reduce(graph: Graph, reduction: Reduction, group: str) -> None:
    """Replaces torch's all-reduce and its wait by ``fusewise.all_reduce``; the norm stays."""
    with graph.inserting_before(reduction.calls[-1]):
        ours = _call(graph, torch.ops.fusewise.all_reduce.default, (reduction.x, group))
    reduction.result.replace_all_uses_with(ours)
    _erase_unread(graph, reduction.calls)


def _sum(graph: Graph, terms: Iterable[Term], dtype: torch.dtype) -> Node | None:
    """The terms, each behind its steps, added up; the widest shape first, so that rows fit."""
    total: Node | None = None
    for term in sorted(terms, key=_rows, reverse=True):
        node = term.node
        for step, position in term.steps:
            node = _call(
                graph, step.target, (*step.args[:position], node, *step.args[position + 1 :])
            )
        node = _cast(graph, node, dtype)
        total = node if total is None else _call(graph, aten.add.Tensor, (total, node))
    return total


def _rows(term: Term) -> int:
    found = value(term.node)
    return found.ndim if found is not None else 0


def _cast(graph: Graph, node: Node, dtype: torch.dtype | None) -> Node:
    if dtype in (None, dtype_of(node)):
        return node
    return _call(graph, torch.ops.prims.convert_element_type.default, (node, dtype))


def _ones(graph: Graph, like: Node, dtype: torch.dtype) -> Node:
    """A row of ones for norms without a weight, once per graph."""
    tensor = value(like)
    assert tensor is not None  # it was matched
    key = (tensor.shape[-1], dtype, tensor.device)
    for node in graph.find_nodes(op="call_function", target=aten.full.default):
        if node.meta.get("fusewise_ones") == key:
            return cast("Node", node)
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    with graph.inserting_after(inputs[-1]), tensor.fake_mode:  # type: ignore[attr-defined]
        keywords: dict[str, Any] = {"dtype": dtype, "device": tensor.device}
        ones = graph.call_function(aten.full.default, ([tensor.shape[-1]], 1.0), keywords)
        ones.meta |= {"val": aten.full(*ones.args, **keywords), "fusewise_ones": key}
    return ones


def _call(graph: Graph, target: Any, args: tuple[Any, ...]) -> Node:
    """A call and its fake value."""
    node = graph.call_function(target, args)
    with torch.no_grad():
        node.meta["val"] = target(*map_arg(args, lambda read: read.meta["val"]))
    return node


def _erase_unread(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erases those that nothing reads; readers come before what they read."""
    for node in nodes:
        if not node.users:
            graph.erase_node(node)
