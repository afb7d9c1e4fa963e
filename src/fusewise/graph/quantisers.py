"""Recognises FP8 quantisation right behind a norm: vLLM's operators. Changes nothing.

Static, per token, and per group of 128 columns: the three whose rule our kernels follow bit for bit
(``backends/native/fp8.py``). Read in vLLM 0.33's ``csrc/libtorch_stable`` schemas: the result, and
dynamic scales, are written in place, so they come functionalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewise.backends.native.fp8 import FP8_MAX, GROUP, MIN_LARGEST, Scaling
from fusewise.graph.nodes import UnlikeError, dtype_of, same_shape, value
from fusewise.graph.norm_ops import Call, functionalised, read_items

# operator: (scaling, its argument for the input, for the result, for the scales)
_OPERATORS: dict[str, tuple[Scaling, str, str, str]] = {
    "_C::static_scaled_fp8_quant": ("static", "input", "result", "scale"),
    "_C::dynamic_per_token_scaled_fp8_quant": ("token", "input", "result", "scale"),
    "_C::per_token_group_fp8_quant": ("group", "input", "output_q", "output_s"),
}
# What the other arguments must be; one that a version lacks is not asked for.
_GROUPS = {
    "group_size": GROUP,
    "eps": MIN_LARGEST,
    "fp8_min": -FP8_MAX,
    "fp8_max": FP8_MAX,
    "scale_ue8m0": False,
}


@dataclass(frozen=True)
class Quantiser:
    """One quantisation of a norm.

    Args:
        scaling: how.
        static_scale: the given scale, with ``static`` only.
        quantised: the node whose value is the FP8 tensor.
        scales: the node whose value is the dynamic scales; None where nothing reads them.
        inner: the nodes that disappear with it.
    """

    scaling: Scaling
    static_scale: Node | None
    quantised: Node
    scales: Node | None
    inner: tuple[Node, ...]


def quantiser_of(norm: Node, anchor: Node) -> Quantiser | None:
    """The first quantisation of ``norm`` that ours reproduces; None without one.

    Args:
        norm: [num_tokens, hidden_size], what the norm gives.
        anchor: the node before which a fused operation will stand.
    """
    for user in norm.users:
        call = functionalised(user)
        if call is not None and call.name in _OPERATORS:
            try:
                found = _quantiser(norm, user, call)
            except UnlikeError:
                continue
            if found is not None and (found.static_scale is None or found.static_scale < anchor):
                return found
    return None


def _quantiser(norm: Node, user: Node, call: Call) -> Quantiser | None:
    scaling, given, result, scale = _OPERATORS[call.name]
    arguments = call.arguments
    if arguments[given] is not norm or not _as_ours(scaling, arguments):
        return None
    # The first in vLLM's schema is named "scale" or "scales", by version.
    scale = scale if scale in arguments else f"{scale}s"
    places = [call.results[result]] + ([] if scaling == "static" else [call.results[scale]])
    quantised, *scales = read_items(user, *places)
    if not _same_rows(norm, quantised) or (scales and not _rows_of_scales(scales[0])):
        return None
    static = arguments[scale] if scaling == "static" else None
    if scaling == "static" and not _is_one_number(static):
        return None
    inner = (user, quantised, *scales)
    return Quantiser(scaling, static, quantised, scales[0] if scales else None, inner)


def _as_ours(scaling: Scaling, arguments: dict[str, Any]) -> bool:
    if scaling == "static":
        return arguments.get("group_shape") is None
    if scaling == "token":
        return arguments.get("scale_ub") is None
    return all(
        math.isclose(arguments[key], wanted) for key, wanted in _GROUPS.items() if key in arguments
    )


def _same_rows(norm: Node, quantised: Node) -> bool:
    """No padding, e4m3, and rows as the operator takes them."""
    before, after = value(norm), value(quantised)
    if before is None or after is None or before.ndim != 2:
        return False
    return same_shape(before, after) and after.dtype == torch.float8_e4m3fn


def _rows_of_scales(scales: Node) -> bool:
    """[num_tokens, scales of a row], row after row; DeepGEMM's columns are another layout."""
    found = value(scales)
    return found is not None and found.ndim == 2 and found.is_contiguous()


def _is_one_number(node: Any) -> bool:
    found = value(node)
    return found is not None and found.numel() == 1 and dtype_of(node) == torch.float32
