"""Recognises the RMSNorm of a given tensor, above all the written-out form. Changes nothing.

Written out means: cast, square, mean over the last dimension, + eps, rsqrt, times the input, cast,
times the weight, in the orders in which Llama's, Qwen's and Gemma's model code and torch's own
decomposition write it. A norm whose intermediates are read by anything else is not recognised. A
weight that ours cannot take (another dtype, a matrix, none) stays in the graph behind the norm.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from fusewise.graph.floats import fixed_float
from fusewise.graph.nodes import (
    UnlikeError,
    argument,
    dtype_of,
    is_cast,
    op_name,
    others_of,
    sole_user,
    value,
    widened,
)
from fusewise.graph.norm_ops import Norm, one_operation

_MUL = "aten::mul.Tensor"
_ADD = ("aten::add.Tensor", "aten::add.Scalar")
_POW = "aten::pow.Tensor_Scalar"


def find_norm(x: Node, dtype: torch.dtype) -> Norm | None:
    """The first RMSNorm of ``x`` in graph order whose result comes in ``dtype``; None without one.

    Raises:
        UnlikeError: there is one, and it is unlike ours.
    """
    reason: UnlikeError | None = None
    wide = (user for user in x.users if is_cast(user, torch.float32))
    for source in (x, *wide):
        for user in source.users:
            try:
                found = one_operation(source, user) or _written_out(source, user, dtype)
            except UnlikeError as unlike:
                reason = reason or unlike
                continue
            if found is not None:
                inner = found.inner if source is x else (source, *found.inner)
                return dataclasses.replace(found, inner=inner)
    if reason is not None:
        raise reason
    return None


def _written_out(x: Node, square: Node, dtype: torch.dtype) -> Norm | None:
    """The written-out form that starts with ``square`` of ``x``; None if it is another thing."""
    if not _is_square(square, x):
        return None
    mean = _only_reader(square)
    shifted = _only_reader(mean)
    root = _only_reader(shifted)
    if not _is_row_mean(mean) or op_name(shifted) not in _ADD or not _is_rsqrt(root):
        return None
    eps = _eps(shifted, mean)
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


def _eps(shifted: Node, mean: Node) -> float:
    """What is added to the mean square: a number, or a graph input that was one in the model."""
    number = _added_constant(shifted)
    if number is None:
        for eps in others_of(shifted, mean):
            number = fixed_float(eps.all_input_nodes[0] if is_cast(eps) else eps)
    if number is None:
        raise UnlikeError("eps is a graph input")
    return number


def _is_rsqrt(node: Node) -> bool:
    if op_name(node) == _POW:
        return bool(node.args[1] == -0.5)
    return op_name(node) == "aten::rsqrt"


def _weighted(scaled: Node, dtype: torch.dtype) -> tuple[Node | None, float, list[Node]]:
    """From ``x · rsqrt`` to the end of the norm: casts and one multiplication by the weight.

    Returns:
        The parameter, the constant added to it, and the nodes, ``scaled`` first.
    """
    nodes = [scaled]
    reader = sole_user(scaled)
    while reader is not None and is_cast(reader) and dtype_of(reader) in (dtype, torch.float32):
        nodes.append(reader)
        reader = sole_user(reader)
    factors = others_of(reader, nodes[-1]) if reader is not None and op_name(reader) == _MUL else []
    if reader is not None and factors:
        weight, bias = _parameter(factors[0], dtype)
        # (x · w).to(dtype), as Gemma and torch write it: the cast is the end of the norm.
        last = sole_user(reader) if dtype_of(reader) != dtype else None
        ends = [reader, last] if last is not None and is_cast(last, dtype) else [reader]
        if dtype_of(ends[-1]) == dtype and weight is not None:
            return weight, bias, [*nodes, *ends]
        if dtype_of(ends[-1]) == dtype and all(dtype_of(node) != dtype for node in nodes):
            return None, 0.0, [scaled]  # a wide weight: the normalised row is rounded before it
    for i, node in enumerate(nodes):
        if dtype_of(node) == dtype:
            return None, 0.0, nodes[: i + 1]
    raise UnlikeError("the norm's result stays in another dtype")


def _parameter(factor: Node, dtype: torch.dtype) -> tuple[Node | None, float]:
    """``w``, ``w + 1`` and exact casts of both → (w, 1.0); None if it is no row of ``dtype``."""
    bias = 0.0
    constant = _added_constant(widened(factor))
    if constant is not None:
        factor, bias = widened(factor).all_input_nodes[0], constant
    factor = widened(factor, dtype)
    found = value(factor)
    fits = found is not None and found.ndim == 1 and found.dtype == dtype
    return (factor if fits else None), bias
