"""Puts the fused operation, or our all-reduce, in the place of a matched site."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch.fx import Graph, Node

import fusewise.run.operators  # noqa: F401  registers torch.ops.fusewise
from fusewise.graph.collectives import Reduction
from fusewise.graph.sites import Match

if TYPE_CHECKING:
    from collections.abc import Iterable


def fuse(graph: Graph, found: Match, group: str) -> None:
    """Replaces a site by ``fusewise.all_reduce_rms_norm``, which runs what the plan says.

    Readers of the norm get its first result, readers of the sum its second. Nodes of the site
    that are read by nothing else disappear.
    """
    norm = found.norm
    with graph.inserting_before(found.anchor):
        x = found.reduction.x
        for view in found.views:
            x = _call(graph, view.target, (x, *view.args[1:]), view)
        fused = graph.call_function(
            torch.ops.fusewise.all_reduce_rms_norm.default,
            (x, found.residual, norm.weight, norm.eps, norm.weight_bias, group),
        )
        total = found.total or norm.out
        fused.meta["val"] = (norm.out.meta["val"], total.meta["val"])
        out = _call(graph, operator.getitem, (fused, 0), norm.out)
        kept = _call(graph, operator.getitem, (fused, 1), total)
    norm.out.replace_all_uses_with(out)
    if found.total is not None:
        found.total.replace_all_uses_with(kept)
    site = (*reversed(found.inner), *reversed(found.views), *found.reduction.calls)
    _erase_unread(graph, (*site, kept))


def replace_all_reduce(graph: Graph, reduction: Reduction, group: str) -> None:
    """Replaces torch's all-reduce and its wait by ``fusewise.all_reduce``; the norm stays."""
    with graph.inserting_before(reduction.calls[-1]):
        target = torch.ops.fusewise.all_reduce.default
        ours = _call(graph, target, (reduction.x, group), reduction.result)
    reduction.result.replace_all_uses_with(ours)
    _erase_unread(graph, reduction.calls)


def _call(graph: Graph, target: object, args: tuple[object, ...], like: Node) -> Node:
    """A call whose value looks like that of an existing node."""
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta["val"] = like.meta["val"]
    return node


def _erase_unread(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erases those that nothing reads; readers come before what they read."""
    for node in nodes:
        if not node.users:
            graph.erase_node(node)
