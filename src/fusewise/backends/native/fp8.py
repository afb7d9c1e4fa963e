"""FP8 e4m3 outputs: how they are described, and a quantiser in torch that ours must equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from fusewise.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Scaling = Literal["static", "token", "group"]
FP8_MAX = 448.0  # the largest finite e4m3
MIN_SCALE = 1.0 / (FP8_MAX * 512.0)  # vLLM's floor for a token's scale
MIN_LARGEST = 1e-10  # vLLM's floor for a group's largest magnitude
GROUP = 128  # elements of one group
ROWS = 2  # dimensions: of scales that belong to rows


@dataclass(frozen=True)
class Fp8:
    """What a fused call writes beside or instead of the norm.

    Args:
        scaling: ``static``: one given scale. ``token``: one per row, from its largest element.
            ``group``: one per 128 columns of a row.
        keep_norm: also write the norm in the tensor's own dtype.

    Raises:
        InputError: an unknown scaling.
    """

    scaling: Scaling
    keep_norm: bool = False

    def __post_init__(self) -> None:
        if self.scaling not in get_args(Scaling):
            raise InputError(
                "unknown FP8 scaling",
                expected=f"one of {', '.join(get_args(Scaling))}",
                got=repr(self.scaling),
            )

    def scales_shape(self, num_tokens: int, hidden_size: int) -> tuple[int, ...]:
        """Shape of the scales: (1,), (num_tokens, 1) or (num_tokens, groups)."""
        if self.scaling == "static":
            return (1,)
        return (num_tokens, 1 if self.scaling == "token" else -(-hidden_size // GROUP))

    def result_of(
        self, norm: Tensor, residual_out: Tensor, static_scale: Tensor | None
    ) -> Fp8Result:
        """What a fused call would have written, from a norm [num_tokens, hidden_size]."""
        quantised, scales = quantise(norm, self, static_scale)
        return Fp8Result(quantised, scales, residual_out, norm if self.keep_norm else None)

    def empty_result(self, x: Tensor, static_scale: Tensor | None) -> Fp8Result:
        """Uninitialised outputs for an input like ``x``."""
        scales = static_scale
        if scales is None:
            scales = x.new_empty(self.scales_shape(*x.shape), dtype=torch.float32)
        return Fp8Result(
            quantised=torch.empty_like(x, dtype=torch.float8_e4m3fn),
            scales=scales,
            residual_out=torch.empty_like(x),
            norm=torch.empty_like(x) if self.keep_norm else None,
        )


@dataclass(frozen=True)
class Fp8Result:
    """Outputs of a fused call with quantisation.

    Attributes:
        quantised: float8_e4m3fn [num_tokens, hidden_size]; multiply by its scale to read it.
        scales: float32, of ``Fp8.scales_shape``.
        residual_out: sum + residual, in the input's dtype.
        norm: the norm in the input's dtype, or None.
    """

    quantised: Tensor
    scales: Tensor
    residual_out: Tensor
    norm: Tensor | None

    def in_shape(self, shape: torch.Size) -> Fp8Result:
        """The results of rows for an input of ``shape``; one scale for all stays as it is."""
        scales = self.scales
        if scales.ndim == ROWS:
            scales = scales.view(*shape[:-1], scales.shape[1])
        norm = None if self.norm is None else self.norm.view(shape)
        return Fp8Result(self.quantised.view(shape), scales, self.residual_out.view(shape), norm)


def check_static_scale(fp8: Fp8, static_scale: Tensor | None, device: torch.device) -> None:
    """Checks that a scale is given exactly when it is needed.

    Raises:
        InputError: missing, superfluous, or not one fp32 number on the device; ``fp8`` is no Fp8.
    """
    if not isinstance(fp8, Fp8):
        raise InputError("fp8", expected="an Fp8, such as Fp8('token')", got=repr(fp8))
    if (fp8.scaling == "static") != (static_scale is not None):
        raise InputError(
            f"{fp8.scaling} scaling",
            expected="a static_scale with scaling='static', none otherwise",
            got="none" if static_scale is None else "one",
        )
    if static_scale is not None and not isinstance(static_scale, torch.Tensor):
        raise InputError("static_scale", expected="a tensor", got=type(static_scale).__name__)
    if static_scale is not None and (
        static_scale.numel() != 1
        or static_scale.dtype != torch.float32
        or static_scale.device != device
    ):
        raise InputError(
            "static_scale",
            expected=f"one float32 on {device}",
            got=f"{list(static_scale.shape)} {static_scale.dtype} on {static_scale.device}",
        )


def quantise(norm: Tensor, fp8: Fp8, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(quantised, scales)`` of a norm [num_tokens, hidden_size]: the reference.

    The rule is vLLM's own, bit for bit (its csrc/…/w8a8/fp8, ``static_scaled_fp8_quant``,
    ``dynamic_per_token_scaled_fp8_quant``, ``per_token_group_fp8_quant`` with eps 1e-10): a static
    scale multiplies by its fp32 reciprocal; a token's scale is the largest magnitude / 448, at
    least ``MIN_SCALE``; a group's is its largest magnitude, at least ``MIN_LARGEST``, / 448; both
    divide. Results are clamped to ±448 and rounded to nearest even. NaN stays NaN, where vLLM's
    kernels make 448 of it.
    """
    check_static_scale(fp8, static_scale, norm.device)
    value = norm.float()
    if static_scale is not None:
        scales = static_scale.view(1)
        return _rounded(value * scales.reciprocal()), scales
    # Divisors are tensors: torch on CUDA multiplies by the reciprocal of a scalar.
    if fp8.scaling == "token":
        largest = value.abs().amax(-1, keepdim=True)
        scales = (largest / torch.full_like(largest, FP8_MAX)).clamp_min(MIN_SCALE)
        return _rounded(value / scales), scales
    groups = _grouped(value)
    largest = groups.abs().amax(-1).clamp_min(MIN_LARGEST)
    scales = largest / torch.full_like(largest, FP8_MAX)
    scaled = (groups / scales.unsqueeze(-1)).flatten(1)
    return _rounded(scaled[:, : value.shape[1]].contiguous()), scales


def _rounded(scaled: Tensor) -> Tensor:
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _grouped(value: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(value, (0, -value.shape[1] % GROUP))
    return padded.view(value.shape[0], padded.shape[1] // GROUP, GROUP)
