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
_OPAQUE: dict[str, Source] = {
    "fusewise::all_reduce": "fusewise",
    "vllm::all_reduce": "engine",  # vllm/distributed/parallel_state.py: (tensor, group_name)
}


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


def reduction_at(node: Node) -> Reduction | None:
    """The all-reduce that ``node`` starts, or None."""
    name = op_name(node)
    if name in _OPAQUE:
        x, group = argument(node, 0, "x"), argument(node, 1, "group")
        if _OPAQUE[name] == "engine":
            x, group = argument(node, 0, "tensor"), argument(node, 1, "group_name")
        return Reduction(x, node, (node,), _OPAQUE[name], str(group))
    if name != "_c10d_functional::all_reduce":
        return None
    x = argument(node, 0, "input")
    reduce_op, group = argument(node, 1, "reduce_op"), str(argument(node, 2, "group_name"))
    wait = sole_user(node)
    obstacle = ""
    if wait is None or op_name(wait) != _WAIT:
        wait, obstacle = node, "the reduction is not waited for exactly once"
    elif str(reduce_op).lower() != "sum":
        obstacle = f"the reduction is {str(reduce_op)!r}, not 'sum'"
    calls = (node,) if wait is node else (wait, node)
    return Reduction(x, wait, calls, "torch", group, obstacle)
