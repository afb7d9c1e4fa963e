"""One site: all-reduces, what is added to them, and the RMSNorm of the sum. Changes nothing.

``match`` follows the sum from the reduced tensor to a norm. Whatever it meets that the fused
operation would not reproduce makes the site stay as it was, and the reason is raised in words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fusewise.graph.collectives import Reduction
from fusewise.graph.nodes import (
    UnlikeError,
    dtype_of,
    dtype_text,
    is_cast,
    is_static,
    same_shape,
    sole_user,
    value,
)
from fusewise.graph.norm_ops import Norm, add_norm
from fusewise.graph.norms import find_norm
from fusewise.graph.quantisers import Quantiser, quantiser_of
from fusewise.graph.sums import USED_ELSEWHERE, Rules, Sum, Term, longer, start, why_it_ends

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Match:
    """A site that can be rewritten.

    Args:
        parts: what is summed, and where it stands in the graph.
        dtype: of the fused operation.
        norm: the norm; ``norm.out`` becomes the first result.
        totals: the nodes whose value becomes the second result.
        anchor: the new operation goes before this node, behind all its inputs.
        quantiser: what quantises the norm, if it can be part of the operation.
    """

    parts: Sum
    dtype: torch.dtype
    norm: Norm
    totals: tuple[Node, ...]
    anchor: Node
    quantiser: Quantiser | None = None

    @property
    def addends(self) -> list[Term]:
        """What is added to the all-reduces."""
        return [term for term in self.parts.terms if term.reduction is None]


def match(reduction: Reduction, rules: Rules) -> Match:
    """The site behind an all-reduce.

    Raises:
        UnlikeError: it stays as it is; says why.
    """
    if reduction.obstacle:
        raise UnlikeError(reduction.obstacle)
    x = value(reduction.x)
    if x is None or x.ndim == 0:
        raise UnlikeError("a shape is unknown")
    if not is_static(x.shape[-1]):
        raise UnlikeError("the hidden size is not constant")
    return _search(start(reduction), rules)


def _search(so_far: Sum, rules: Rules) -> Match:
    """The longest sum that ends in a norm, before shorter ones."""
    reason: UnlikeError | None = None
    for user in so_far.at.users:
        try:
            one = add_norm(so_far.at, user)
            if one is not None:
                if len(so_far.at.users) > 1:
                    raise UnlikeError(USED_ELSEWHERE)
                parts = Sum(so_far.at, (*so_far.terms, Term(one.residual)), so_far.inner)
                return _checked(parts, one.norm, () if one.total is None else (one.total,), user)
        except UnlikeError as unlike:
            reason = reason or unlike
    for further in longer(so_far, rules):
        try:
            if isinstance(further, UnlikeError):
                raise further
            found = _search(further, rules)
            if sole_user(so_far.at) is None:
                raise UnlikeError(USED_ELSEWHERE)
            return found
        except UnlikeError as unlike:
            reason = reason or unlike
    try:
        return _ended(so_far)
    except _NoNormError as unlike:
        raise reason or unlike from None


class _NoNormError(UnlikeError):
    """Nothing that looks like a norm reads the sum."""


def _ended(so_far: Sum) -> Match:
    """The site whose norm reads the sum as it is."""
    dtype = _common_dtype(so_far)
    norm = find_norm(so_far.at, dtype)
    if norm is None:
        raise _NoNormError(why_it_ends(so_far))
    readers = [user for user in so_far.at.users if user not in norm.inner]
    totals: tuple[Node, ...] = (so_far.at,) if readers else ()
    if dtype_of(so_far.at) != dtype:
        if not all(is_cast(user, dtype) for user in readers):
            raise UnlikeError("the sum is used in another dtype")
        totals = tuple(readers)
    anchor = so_far.at if so_far.inner else min(so_far.at.users)
    return _checked(so_far, norm, totals, anchor)


def _common_dtype(so_far: Sum) -> torch.dtype:
    """What the fused operation computes in: the parts' dtype, or fp32 for a wide residual."""
    given = [dtype_of(term.node) for term in so_far.terms]
    total = dtype_of(so_far.at)
    for dtype in (*_HALVES, torch.float32, torch.float64):
        if {*given} == {dtype} and total in (dtype, torch.float32):
            return dtype
    if {*given} <= {*_HALVES, torch.float32} and total == torch.float32:
        return torch.float32
    raise UnlikeError(f"dtypes differ: {' + '.join(map(dtype_text, given))} = {dtype_text(total)}")


def _checked(parts: Sum, norm: Norm, totals: tuple[Node, ...], anchor: Node) -> Match:
    """Shapes, dtypes and order, as the fused operation needs them."""
    dtype = _common_dtype(parts)
    total = value(parts.at)
    found = Match(parts, dtype, norm, totals, anchor)
    assert total is not None  # its dtype is known
    for term in parts.terms:
        if term.reduction is not None and not same_shape(_last(term), total):
            raise UnlikeError("shapes differ: rows are regrouped")
    whole = [same_shape(_last(term), total) for term in found.addends]
    if found.addends and not any(whole):
        raise UnlikeError("shapes differ: the residual is broadcast")
    normed, weight = value(norm.out), value(norm.weight)
    if normed is None or not same_shape(normed, total):
        raise UnlikeError("shapes differ: the norm regroups rows")
    if norm.weight is None:
        return found
    found = replace(found, quantiser=quantiser_of(norm.out, anchor))
    if weight is None or weight.dtype != dtype or normed.dtype != dtype:
        raise UnlikeError("dtypes differ: the norm's operation has another")
    if tuple(weight.shape) != (total.shape[-1],):
        raise UnlikeError(f"the weight's shape {tuple(weight.shape)} is no row of the sum")
    if not norm.weight < anchor:
        raise UnlikeError("the weight is computed behind the sum")
    return found


def _last(term: Term) -> torch.Tensor:
    """The shape a term comes to behind its steps."""
    found = value(term.steps[-1][0] if term.steps else term.node)
    if found is None:
        raise UnlikeError("a shape is unknown")
    return found
