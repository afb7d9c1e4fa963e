"""How far from float64 a right result may be, element by element: a bound, whatever the order.

Every way to add is allowed that rounds at most once per addition, in any order of the ranks. Its
error is bounded by the magnitudes that were added, not by the sum that is left of them: where large
values cancel, a right result may be far off. (Higham, Accuracy and Stability of Numerical
Algorithms, section 4.2.) Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.tune.operands import Operands

# Behind the sum: normalised, ``1 + weight`` and their product, each rounded to the dtype by one
# kernel or another.
_NORM_ROUNDINGS = 3
# A row's sum of squares, its root and two products in fp32, in units of its eps.
_FP32_ROOM = 16.0
# Where relative errors end. fp32, and bf16 with it, may be flushed to zero where it is subnormal:
# what a flushed row is off by, times the largest 1/sqrt(eps). fp16 is subnormal below 6e-5 and
# rounds there to multiples of 2**-24, each time by half of that.
_NEAR_ZERO = {
    torch.bfloat16: 1e-33, torch.float16: _NORM_ROUNDINGS * 2**-25, torch.float32: 1e-33,
}  # fmt: skip


def budgets(
    given: Operands, exact: tuple[Tensor, ...], eps: float, weight_bias: float
) -> tuple[Tensor, ...]:
    """The largest error allowed to each element of ``exact``; zero where that is not finite.

    Args:
        given: what was reduced.
        exact: the operation's reference in float64, the sum last.
        eps: the norm's.
        weight_bias: the norm's.
    """
    *norms, total = exact
    added = [*given.inputs, *([] if given.residual is None or not norms else [given.residual])]
    dtype = given.inputs[0].dtype
    unit = torch.finfo(dtype).eps / 2
    # Any partial sum is at most what has one sign.
    largest = (sum(x.abs().double() for x in added) + total.abs()) / 2
    # u / (1 - n·u) for n roundings: Higham's gamma, errors of errors included.
    roundings = (len(added) - 1) * unit
    of_total = torch.where(total.isfinite(), largest * (roundings / (1 - roundings)), 0.0)
    allowed = [of_total]
    if norms:
        scale = (total.square().mean(-1, keepdim=True) + eps).rsqrt()
        # The row's scale is off by no more than the row, relatively.
        of_scale = of_total.square().mean(-1, keepdim=True).sqrt() * scale
        rounded = _NORM_ROUNDINGS * unit + _FP32_ROOM * torch.finfo(torch.float32).eps
        factor = scale * (given.weight.double() + weight_bias).abs()
        allowed.insert(0, of_total * factor + norms[0].abs() * (of_scale + rounded))
    return tuple(
        torch.where(of.isfinite(), one, 0.0) + _NEAR_ZERO[dtype]
        for of, one in zip(exact, allowed, strict=True)
    )
