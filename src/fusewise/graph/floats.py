"""Python floats that Dynamo turned into graph inputs: their value, fixed by a guard.

With ``dynamic=True``, and for a second model with another eps, Dynamo passes ``self.eps`` as a 0-d
float64 tensor. An eps is a constant of its model. So it is specialised: the shape environment gets
the guard that Dynamo would have set, and another eps compiles another graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fusewise.graph.nodes import value


def fixed_float(node: object) -> float | None:
    """The float that ``node`` was made of, from now on guarded; None if it is something else."""
    tensor = value(node)
    if not isinstance(node, Node) or tensor is None or node not in (ours := _scalars(node.graph)):
        return None
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        traced = InstructionTranslator.current_tx().output.graph
    except AttributeError:  # not below Dynamo
        return None
    theirs = _scalars(traced)
    if len(theirs) != len(ours):
        return None
    made_of: Any = theirs[ours.index(node)].meta.get("grapharg")
    if made_of is None or not made_of.pass_arg_as_tensor:
        return None
    return _guarded(tensor, made_of.source)


def _scalars(graph: Graph) -> list[Node]:
    """The 0-d float64 inputs, in order: AOTAutograd keeps the order of what Dynamo passes."""
    found = []
    for node in graph.nodes:
        tensor = node.meta.get("val", node.meta.get("example_value"))
        if node.op != "placeholder" or not isinstance(tensor, torch.Tensor):
            continue
        if tensor.ndim == 0 and tensor.dtype == torch.float64 and tensor.device.type == "cpu":
            found.append(node)
    return found


def _guarded(tensor: Any, source: Any) -> float | None:
    import sympy  # type: ignore[import-untyped]

    environment = tensor.fake_mode.shape_env
    name = _name(source)
    for symbol, sources in environment.var_to_sources.items():
        if name in map(_name, sources):
            values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
            number = values[symbol]
            if not environment.evaluate_expr(sympy.Eq(symbol, number, evaluate=False)):
                return None
            return float(number)
    return None


def _name(source: Any) -> str:
    """torch 2.11 has a method here, later ones a property."""
    return str(source.name() if callable(source.name) else source.name)
