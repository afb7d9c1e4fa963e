"""The Triton source of residual-add + RMSNorm. Imported only on a machine with a GPU.

No annotations but ``tl.constexpr``: Triton reads them as types of its own.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def residual_rms_norm_kernel(
    x,
    residual,
    weight,
    norm,
    total,
    hidden_size,
    eps,
    weight_bias,
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program per row; the row stays in registers between the sum and the store."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    at = row * hidden_size + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / hidden_size + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + weight_bias
    tl.store(norm + at, (value * scale * gain).to(norm.dtype.element_ty), mask=inside)
