"""Recognises the RMSNorm of a given tensor, above all the written-out form. Changes nothing.

Written out means: cast, square, mean over the last dimension, + eps, rsqrt, times the input, cast,
times the weight, in the orders in which Llama's, Qwen's and Gemma's model code and torch's own
decomposition write it. A norm whose intermediates are read by anything else is not recognised.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from fusewise.graph.nodes import UnlikeError, argument, is_cast, op_name, sole_user, value
from fusewise.graph.norm_ops import Norm, one_operation

_MUL = "aten::mul.Tensor"
_ADD = ("aten::add.Tensor", "aten::add.Scalar")
_POW = "aten::pow.Tensor_Scalar"


def find_norm(x: Node) -> Norm:
    """The first RMSNorm of ``x`` in graph order.

    Raises:
        UnlikeError: there is none, or it is unlike ours; says which.
    """
    reason: UnlikeError | None = None
    tensor = value(x)
    dtype = tensor.dtype if tensor is not None else torch.float32
    for source in (x, *(user for user in x.users if is_cast(user, torch.float32))):
        for user in source.users:
            try:
                found = one_operation(source, user) or _written_out(source, user, dtype)
            except UnlikeError as unlike:
                reason = reason or unlike
                continue
            if found is not None:
                inner = found.inner if source is x else (source, *found.inner)
                return dataclasses.replace(found, inner=inner)
    raise reason or UnlikeError("no RMSNorm follows")


def _written_out(x: Node, square: Node, dtype: torch.dtype) -> Norm | None:
    """The written-out form that starts with ``square`` of ``x``; None if it is another thing.

    ``dtype`` is what the norm's result must come back to.
    """
    if not _is_square(square, x):
        return None
    mean = _only_reader(square)
    shifted = _only_reader(mean)
    root = _only_reader(shifted)
    eps = _added_constant(shifted)
    if not _is_row_mean(mean) or eps is None or not _is_rsqrt(root):
        return None
    scaled = _only_reader(root)
    if op_name(scaled) != _MUL or {*scaled.all_input_nodes} != {x, root}:
        return None
    weight, bias, tail = _weighted(scaled, dtype)
    return Norm(tail[-1], weight, eps, bias, (square, mean, shifted, root, *tail))


def _only_reader(node: Node) -> Node:
    reader = sole_user(node)
    if reader is None:
        raise UnlikeError("an intermediate of the norm is used elsewhere")
    return reader


def _is_square(node: Node, x: Node) -> bool:
    if op_name(node) == _POW:
        return bool(node.args[0] is x and node.args[1] == 2)
    return op_name(node) == _MUL and node.args == (x, x)


def _is_row_mean(node: Node) -> bool:
    source = value(node.args[0]) if node.args else None
    if op_name(node) != "aten::mean.dim" or source is None:
        return False
    dims = list(argument(node, 1, "dim") or [])
    return dims in ([-1], [source.ndim - 1]) and bool(argument(node, 2, "keepdim", False))


def _added_constant(node: Node) -> float | None:
    """The number in ``tensor + number``."""
    if op_name(node) not in _ADD or len(node.args) != 2 or node.kwargs:
        return None
    numbers = [float(a) for a in node.args if isinstance(a, (int, float))]
    return numbers[0] if numbers else None


def _is_rsqrt(node: Node) -> bool:
    if op_name(node) == _POW:
        return bool(node.args[1] == -0.5)
    return op_name(node) == "aten::rsqrt"


def _weighted(scaled: Node, dtype: torch.dtype) -> tuple[Node, float, list[Node]]:
    """From ``x · rsqrt`` to the end of the norm: casts and one multiplication by the weight.

    Returns:
        The parameter, the constant added to it, and the nodes, ``scaled`` first.
    """
    nodes = [scaled]
    while is_cast(reader := _only_reader(nodes[-1])):
        nodes.append(reader)
    factors = [node for node in reader.all_input_nodes if node is not nodes[-1]]
    weight, bias = _parameter(factors[0]) if op_name(reader) == _MUL and factors else (None, 0.0)
    if weight is None:
        raise UnlikeError("the norm has no weight of one row")
    nodes.append(reader)
    weighted, last = value(reader), sole_user(reader)
    # (x · w).to(dtype), as Gemma and torch write it: the cast is the end of the norm.
    wide = weighted is not None and weighted.dtype != dtype
    if wide and last is not None and is_cast(last, dtype):
        nodes.append(last)
    return weight, bias, nodes


def _parameter(factor: Node) -> tuple[Node | None, float]:
    """``w``, ``w + 1`` and casts of both → (w, 1.0); None if it is no single row."""
    bias = 0.0
    while True:
        constant = _added_constant(factor)
        if constant is not None and not bias:
            bias = constant
        elif not is_cast(factor):
            break
        factor = factor.all_input_nodes[0]
    found = value(factor)
    return (factor if found is not None and found.ndim == 1 else None), bias
