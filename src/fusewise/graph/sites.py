"""One site: an all-reduce, the residual behind it, and the RMSNorm of the sum. Changes nothing.

``match`` walks from the reduced tensor to its readers. Whatever it meets that the fused operation
would not reproduce makes the site stay as it was, and the reason is raised in words.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fusewise.graph.collectives import Reduction
from fusewise.graph.nodes import (
    UnlikeError,
    is_row_view,
    is_static,
    op_name,
    same_shape,
    sole_user,
    value,
)
from fusewise.graph.norm_ops import Norm, add_norm
from fusewise.graph.norms import find_norm


@dataclass(frozen=True)
class Match:
    """A site that can be rewritten.

    Args:
        reduction: the all-reduce.
        views: regroupings of rows between the reduction and the norm, in order.
        residual: what is added to the sum, or None.
        norm: the norm; ``norm.out`` becomes the first result.
        total: the node whose value becomes the second result; None where nobody reads it.
        inner: every node that disappears, first to last; those read by others stay.
        anchor: the new operation goes before this node, behind all its inputs.
    """

    reduction: Reduction
    views: tuple[Node, ...]
    residual: Node | None
    norm: Norm
    total: Node | None
    inner: tuple[Node, ...]
    anchor: Node


def match(reduction: Reduction) -> Match:
    """The site behind an all-reduce.

    Raises:
        UnlikeError: it stays as it is; says why.
    """
    if reduction.obstacle:
        raise UnlikeError(reduction.obstacle)
    reduced, views = reduction.result, []
    while (following := sole_user(reduced)) is not None and is_row_view(following):
        views.append(following)
        reduced = following
    found = _first_form(reduction, tuple(views), reduced)
    _check(found)
    return found


def _first_form(reduction: Reduction, views: tuple[Node, ...], reduced: Node) -> Match:
    """The first form that fits among those that add a residual, then the one that adds none."""
    reason: UnlikeError | None = None
    for user in reduced.users:
        try:
            found = _added(reduction, views, reduced, user)
        except UnlikeError as unlike:
            reason = reason or unlike
            continue
        if found is not None:
            return found
    try:
        norm = find_norm(reduced)
    except UnlikeError as unlike:
        raise reason or unlike from None
    return Match(reduction, views, None, norm, reduced, norm.inner, min(reduced.users))


def _added(
    reduction: Reduction, views: tuple[Node, ...], reduced: Node, user: Node
) -> Match | None:
    """The site in which ``user`` adds the residual; None if it adds nothing."""
    one = add_norm(reduced, user)
    if one is not None:
        norm, residual, total = one.norm, one.residual, one.total
        inner = norm.inner
    elif op_name(user) == "aten::add.Tensor" and len(user.all_input_nodes) == 2:
        norm, total = find_norm(user), user
        residual = next(node for node in user.all_input_nodes if node is not reduced)
        inner = (user, *norm.inner)
        if user.kwargs.get("alpha", 1) != 1:
            raise UnlikeError("the residual is added with a factor")
    else:
        return None
    if sole_user(reduced) is None:
        raise UnlikeError("the reduced tensor is used elsewhere")
    return Match(reduction, views, residual, norm, total, inner, user)


def _check(found: Match) -> None:
    """Shapes, dtypes and order, as the fused operation needs them."""
    nodes = {
        "reduced": found.reduction.x,
        "residual": found.residual,
        "sum": found.total or found.norm.out,
        "norm": found.norm.out,
        "weight": found.norm.weight,
    }
    tensors = {name: value(node) for name, node in nodes.items() if node is not None}
    known = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len(known) < len(tensors) or known["reduced"].ndim == 0:
        raise UnlikeError("a shape is unknown")
    if len({tensor.dtype for tensor in known.values()}) > 1:
        dtypes = (f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in known.items())
        raise UnlikeError(f"dtypes differ: {', '.join(dtypes)}")
    hidden_size, total = known["reduced"].shape[-1], known["sum"]
    if not is_static(hidden_size):
        raise UnlikeError("the hidden size is not constant")
    if tuple(known["weight"].shape) != (hidden_size,):
        raise UnlikeError(f"the weight's shape {tuple(known['weight'].shape)} is no row of the sum")
    if total.shape[-1] != hidden_size or not all(
        same_shape(known[name], total) for name in ("residual", "norm") if name in known
    ):
        raise UnlikeError("shapes differ: the residual is broadcast, or rows are regrouped")
    if not found.norm.weight < found.anchor:
        raise UnlikeError("the weight is computed behind the sum")
