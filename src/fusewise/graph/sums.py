"""The sum behind an all-reduce: what else is added before the norm. Changes nothing.

Everything here is linear, so it may be done before the ranks' parts are summed: views that regroup
rows, a factor, and further addends. What tensor parallelism promises is assumed: whatever is added
to a reduced tensor, or multiplies it, is the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fusewise.graph.collectives import Reduction, reduction_behind
from fusewise.graph.nodes import (
    UnlikeError,
    dtype_of,
    is_cast,
    is_row_view,
    op_name,
    others_of,
    sole_user,
    value,
    widened,
)

USED_ELSEWHERE = "the reduced tensor is used elsewhere"
_REACH = 12  # nodes between an all-reduce and its norm: the longest seen in a model are 6
_ADD, _MUL, _DIV = "aten::add.Tensor", "aten::mul.Tensor", "aten::div.Tensor"


@dataclass(frozen=True)
class Term:
    """What one node contributes to a sum.

    Args:
        node: each rank's part of a reduction, or an addend that all ranks hold.
        steps: views and factors to repeat on it, in order, each with its operand's position.
        reduction: where the part comes from; None for an addend.
    """

    node: Node
    steps: tuple[tuple[Node, int], ...] = ()
    reduction: Reduction | None = None


@dataclass(frozen=True)
class Sum:
    """A sum as far as it was followed.

    Args:
        at: the node whose value it is.
        terms: what it is made of; the first is a reduction.
        inner: nodes from the first reduction's result to ``at``, and those of other reductions.
    """

    at: Node
    terms: tuple[Term, ...]
    inner: tuple[Node, ...] = ()

    @property
    def reductions(self) -> list[Reduction]:
        """The all-reduces in it, the first one first."""
        return [term.reduction for term in self.terms if term.reduction is not None]


@dataclass(frozen=True)
class Rules:
    """What may be done before the sum.

    Args:
        group_names: names of the group whose all-reduces may be taken together.
        scale_first: whether factors that are no power of two may be applied before the sum.
    """

    group_names: frozenset[str]
    scale_first: bool = False


def start(reduction: Reduction) -> Sum:
    """The sum that is the reduction itself."""
    return Sum(reduction.result, (Term(reduction.x, (), reduction),))


def longer(so_far: Sum, rules: Rules) -> Iterator[Sum | UnlikeError]:
    """Each way to follow the sum by one node, or what forbids it; nothing where it ends."""
    for user in so_far.at.users if len(so_far.inner) < _REACH else ():
        try:
            following = _followed(so_far, user, rules)
        except UnlikeError as unlike:
            yield unlike
            continue
        if following is not None:
            yield following


def _followed(so_far: Sum, user: Node, rules: Rules) -> Sum | None:
    """The sum behind ``user``; None if it does something else than continue it."""
    inner = (*so_far.inner, user)
    if is_row_view(user):
        return Sum(user, tuple(_regrouped(term, user, so_far.at) for term in so_far.terms), inner)
    part = value(so_far.terms[0].node)
    if is_cast(user) and part is not None and dtype_of(user) in (torch.float32, part.dtype):
        return Sum(user, so_far.terms, inner) if sole_user(so_far.at) is user else None
    if sole_user(so_far.at) is user and _is_factor(so_far.at, user, rules):
        if len(so_far.reductions) < len(so_far.terms):
            raise UnlikeError("the sum with its addend is scaled")
        return Sum(user, tuple(_stepped(term, user, so_far.at) for term in so_far.terms), inner)
    return _added(so_far, user, rules)


def _added(so_far: Sum, user: Node, rules: Rules) -> Sum | None:
    """The sum behind an addition: of another all-reduce, or of what all ranks hold."""
    inner = (*so_far.inner, user)
    if op_name(user) != _ADD or len(user.all_input_nodes) != 2:
        return None
    if user.kwargs.get("alpha", 1) != 1:
        raise UnlikeError("the residual is added with a factor")
    (other,) = others_of(user, so_far.at)
    partner = _partner(other, rules)
    if partner is None:
        return Sum(user, (*so_far.terms, Term(widened(other))), inner)
    return Sum(user, (*so_far.terms, *partner.terms), (*partner.inner, *inner))


def _regrouped(term: Term, view: Node, at: Node) -> Term:
    """A bias of one row fits whatever the rows are."""
    found = value(term.node)
    is_row = term.reduction is None and found is not None and found.ndim == 1
    return term if is_row else _stepped(term, view, at)


def _stepped(term: Term, step: Node, at: Node) -> Term:
    return replace(term, steps=(*term.steps, (step, step.args.index(at))))


def _is_factor(x: Node, product: Node, rules: Rules) -> bool:
    """Whether ``product`` is ``x`` times something that may as well be applied before the sum.

    A power of two changes no rounding. A gate, one number per row, is part of a sum with the
    routed experts, whose order is lost anyway.
    """
    if op_name(product) not in (_MUL, _DIV):
        return False
    if any(product.args[1 - i] is x for i in range(2) if isinstance(product.args[i], (int, float))):
        number = next(float(a) for a in product.args if isinstance(a, (int, float)))
        if product.args[0] is not x and op_name(product) == _DIV:
            return False
        if rules.scale_first or abs(math.frexp(number)[0]) == 0.5:
            return True
        raise UnlikeError(f"scaled by {number:g}, which is no power of two")
    factors = others_of(product, x)
    gate, whole = value(factors[0]) if factors else None, value(product)
    if gate is None or whole is None or product.args[0] is product.args[1]:
        return False
    if gate.ndim == 0:
        if not rules.scale_first:
            raise UnlikeError("scaled by a tensor of one element")
        return op_name(product) == _MUL or product.args[0] is x
    return op_name(product) == _MUL and gate.ndim == whole.ndim and gate.shape[-1] == 1


def _partner(node: Node, rules: Rules) -> Sum | None:
    """The sum that ``node`` is, where it is another all-reduce and nothing else reads it."""
    path: list[Node] = []
    at = node
    while reduction_behind(at) is None:
        if sole_user(at) is None or not (is_row_view(at) or op_name(at) == _MUL or is_cast(at)):
            return None
        path.append(at)
        sources = [n for n in at.all_input_nodes if _leads_to_reduction(n)]
        if len(sources) != 1:
            return None
        at = sources[0]
    reduction = reduction_behind(at)
    if reduction is None or reduction.obstacle or reduction.group not in rules.group_names:
        return None
    so_far = start(reduction)
    for following in reversed(path):
        if sole_user(so_far.at) is not following:
            return None
        further = _followed(so_far, following, rules)
        if further is None:
            return None
        so_far = further
    return so_far if sole_user(so_far.at) is not None else None


def _leads_to_reduction(node: Node, reach: int = 3) -> bool:
    if reduction_behind(node) is not None:
        return True
    if not reach or not (is_row_view(node) or op_name(node) == _MUL or is_cast(node)):
        return False
    return any(_leads_to_reduction(n, reach - 1) for n in node.all_input_nodes)


_MEANS = {
    "aten::native_layer_norm": "LayerNorm follows, not RMSNorm",
    "aten::var_mean": "LayerNorm follows, not RMSNorm",
    "aten::slice": "a slice stands between",
    "aten::select": "a slice stands between",
    "aten::index": "an index stands between",
    "aten::cat": "a concatenation stands between",
    "prims::convert_element_type": "a cast stands between",
}


def why_it_ends(so_far: Sum) -> str:
    """What stands where a norm was looked for, in words."""
    readers = sorted({_name(user) for user in so_far.at.users})
    if not readers or readers == ["output"]:
        return "no RMSNorm follows: the graph ends"
    if readers == ["aten::mean", "aten::sub"]:
        return _MEANS["aten::var_mean"]
    for reader in readers:
        if reader in _MEANS:
            return _MEANS[reader]
        if any(word in reader for word in ("all_reduce", "reduce_scatter", "all_gather")):
            return f"another collective follows: {reader}"
    return f"no RMSNorm follows, but {', '.join(readers)}"


def _name(node: Node) -> str:
    return op_name(node).partition(".")[0] or str(node.op)
