"""What a finished call must look like. Each function raises AssertionError with the first fault."""

from __future__ import annotations

import torch
from torch import Tensor

from .virtual_group import GUARD, POISON, Call, VirtualGroup

# Relative distance to the float64 norm: half a unit in the last place, and the fp32 path before it.
# Two-shot normalises the rounded sum, so it rounds twice.
TOLERANCE = {torch.bfloat16: 2.0**-8 + 1e-6, torch.float16: 2.0**-11 + 1e-6, torch.float32: 2e-6}
FP8_MAX = 448.0
MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
MIN_LARGEST = 1e-10


def assert_call_is_right(call: Call) -> None:
    """Every rank holds the same bits; the sum is exact, the norm within rounding."""
    dtype, shape = call.x[0].dtype, call.x[0].shape
    sums = call.residual_out if call.fused else call.out
    expected = call.sum().to(dtype)
    for rank in range(len(call.x)):
        _same(_inside(sums[rank], shape), expected, f"sum of rank {rank}")
        for tensors in (call.out, call.residual_out, call.quantised, call.scales):
            _same(tensors[rank], tensors[0], f"rank {rank} against rank 0")
    _guarded(call)
    if call.fused and call.normal_output:
        got, norm = _inside(call.out[0], shape).double(), call.norm()
        finite = torch.isfinite(norm)
        assert torch.equal(torch.isnan(got), torch.isnan(norm.to(dtype)))
        error = ((got - norm).abs() / norm.abs().clamp_min(1e-3))[finite]
        bound = TOLERANCE[dtype] * (2 if call.instance.kernel == "two_shot" else 1)
        assert error.numel() == 0 or error.max() <= bound, f"norm off by {error.max()}"
    if call.instance.output.endswith("Fp8"):
        _check_fp8(call)


def _check_fp8(call: Call) -> None:
    shape = call.x[0].shape
    norm = _inside(call.out[0], shape).float()
    width = 128 if call.instance.output == "kGroupFp8" else shape[1]
    padded = torch.nn.functional.pad(norm, (0, -shape[1] % width))
    blocks = padded.view(shape[0], -1, width)
    if call.instance.output == "kStaticFp8":
        quantised = blocks * (1.0 / torch.tensor(call.static_scale))
    else:
        scales = _dynamic_scales(blocks.abs().amax(-1), call.instance.output)
        _same(call.scales[0][: scales.numel()], scales.flatten(), "scales")
        quantised = blocks / scales[..., None]
    codes = quantised.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    expected = codes.reshape(shape[0], -1)[:, : shape[1]]
    _same(call.quantised[0][: shape.numel()].view(shape), expected, "fp8")


def _dynamic_scales(largest: Tensor, output: str) -> Tensor:
    if output == "kGroupFp8":
        return largest.clamp_min(MIN_LARGEST) / FP8_MAX
    return (largest / FP8_MAX).clamp_min(MIN_SCALE)


def assert_group_is_idle(group: VirtualGroup) -> None:
    """After all calls: slots empty, epochs agreed on, nobody dead."""
    for rank in range(group.world_size):
        assert torch.all(group.slots[rank] == -1), f"rank {rank} left a slot full"
        _same(group.epochs[rank], group.epochs[0], f"epochs of rank {rank}")
        assert group.dead[rank][0].item() == 0 == group.status[rank][0].item()


def _inside(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[: shape.numel()].view(shape)


def _guarded(call: Call) -> None:
    for tensors, poison in (
        (call.out, POISON), (call.residual_out, POISON), (call.scales, POISON),
        (call.quantised, 0x55),
    ):  # fmt: skip
        for tensor in tensors:
            assert torch.all(tensor[-GUARD:] == poison), "written behind the end"


def _same(got: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit; only which NaN it is may differ."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    bits = kinds[got.element_size()]
    differs = got.contiguous().view(bits) != expected.contiguous().view(bits)
    if got.is_floating_point():
        differs &= ~(torch.isnan(got) & torch.isnan(expected))
    if torch.any(differs):
        at = differs.nonzero()[0].tolist()
        raise AssertionError(
            f"{what} differs at {at} and {int(differs.sum()) - 1} others: "
            f"{got[tuple(at)].item()}, expected {expected[tuple(at)].item()}"
        )
