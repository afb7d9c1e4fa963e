"""Recognises all-reduces in a graph: torch's functional ones, ours, and engines' opaque ones.

Says what is reduced, under which group's name, and what stands against moving it. Whether it is
worth moving is not asked here. In-place forms do not occur: torch functionalises them before the
pass runs, and Inductor makes them in-place again only behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from fusewise.graph.nodes import argument, op_name, sole_user

Source = Literal["torch", "fusewise", "engine"]

_WAIT = "_c10d_functional::wait_tensor"
_OPAQUE: dict[str, Source] = {"fusewise::all_reduce": "fusewise", "vllm::all_reduce": "engine"}
_ARGUMENTS = {
    "fusewise::all_reduce": ("x", "group"),
    "vllm::all_reduce": ("tensor", "group_name"),  # vllm/distributed/parallel_state.py
}
# torch 2.13 with distributed.config.compile_on_one_rank passes the group as a graph input.
_NO_NAME = "the group has no name in the graph"


@dataclass(frozen=True)
class Reduction:
    """One all-reduce.

    Args:
        x: what each rank contributes.
        result: the node whose value is the sum.
        calls: the nodes that disappear with it, last first.
        source: whose all-reduce it is.
        group: the group's name as the graph has it.
        obstacle: why it must stay as it is, whatever follows it; empty without a reason.
    """

    x: Node
    result: Node
    calls: tuple[Node, ...]
    source: Source
    group: str
    obstacle: str = ""


def reduction_behind(result: Node) -> Reduction | None:
    """The all-reduce whose sum ``result`` is, or None."""
    start = argument(result, 0, "input") if op_name(result) == _WAIT else result
    found = reduction_at(start) if isinstance(start, Node) else None
    return found if found is not None and found.result is result else None


def reduction_at(node: Node) -> Reduction | None:
    """The all-reduce that ``node`` starts, or None."""
    name = op_name(node)
    if name in _OPAQUE:
        x_name, group_name = _ARGUMENTS[name]
        x, group = argument(node, 0, x_name), argument(node, 1, group_name)
        obstacle = "" if isinstance(group, str) else _NO_NAME
        return Reduction(x, node, (node,), _OPAQUE[name], str(group), obstacle)
    if name != "_c10d_functional::all_reduce":
        return None
    x, group = argument(node, 0, "input"), argument(node, 2, "group_name")
    reduce_op = str(argument(node, 1, "reduce_op")).lower()
    wait = sole_user(node)
    if wait is None or op_name(wait) != _WAIT:
        obstacle = "the reduction is not waited for exactly once"
        return Reduction(x, node, (node,), "torch", str(group), obstacle)
    obstacle = "" if isinstance(group, str) else _NO_NAME
    if reduce_op != "sum":
        obstacle = f"the reduction is {reduce_op!r}, not 'sum'"
    return Reduction(x, wait, (wait, node), "torch", str(group), obstacle)
