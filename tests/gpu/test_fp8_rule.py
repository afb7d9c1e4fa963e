"""The reference quantiser against vLLM's own kernels, bit for bit, where vLLM is installed.

Only NaN may differ: vLLM's kernels make 448 of it, ours keep it.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fusewise.backends.native.fp8 import GROUP, Fp8, quantise

EPS = 1e-10  # per_token_group_quant_fp8's default


def _vllm_kernels() -> Any:
    """vLLM's operators, without the package around them; None where they are not."""
    try:
        importlib.import_module("vllm._C")
        importlib.import_module("vllm._C_stable_libtorch")
    except (ImportError, OSError):  # not there, or made for another torch
        return None
    return torch.ops._C


KERNELS = _vllm_kernels() if torch.cuda.is_available() else None
pytestmark = pytest.mark.skipif(KERNELS is None, reason="needs a GPU and vLLM's kernels")


def _norms(dtype: torch.dtype, hidden_size: int) -> torch.Tensor:
    """Normals, rows of tiny and of large numbers, zeros, and rows of a single element."""
    generator = torch.Generator().manual_seed(hidden_size)
    norm = torch.randn(256, hidden_size, generator=generator)
    norm[64:128] *= torch.logspace(-7, 4, 64).unsqueeze(1)
    norm[128] = 0.0
    norm[129] = 0.0
    norm[129, 5] = 3e-5
    return norm.to("cuda", dtype)


def _assert_equal(got: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    """Codes and scales to the bit."""
    assert torch.equal(got[1].view(torch.int32).flatten(), theirs[1].view(torch.int32).flatten())
    differs = got[0].view(torch.uint8) != theirs[0].view(torch.uint8)
    assert not differs.any(), f"{int(differs.sum())} of {differs.numel()} codes differ"


DTYPES = [torch.bfloat16, torch.float16]
WIDTHS = [2048, 2880, 4096, 7168]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("hidden_size", WIDTHS)
def test_a_static_scale(dtype: torch.dtype, hidden_size: int) -> None:
    norm = _norms(dtype, hidden_size)
    for scale in (0.003, 0.02, 1.0, 0.0371, 7.3):
        static = torch.full((1,), scale, device="cuda")
        codes = torch.empty_like(norm, dtype=torch.float8_e4m3fn)
        KERNELS.static_scaled_fp8_quant(codes, norm, static, None)
        _assert_equal(quantise(norm, Fp8("static"), static), (codes, static))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("hidden_size", WIDTHS)
def test_a_scale_for_each_token(dtype: torch.dtype, hidden_size: int) -> None:
    norm = _norms(dtype, hidden_size)
    codes = torch.empty_like(norm, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(norm), 1, device="cuda")
    KERNELS.dynamic_per_token_scaled_fp8_quant(codes, norm, scales, None)
    _assert_equal(quantise(norm, Fp8("token")), (codes, scales))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [w for w in WIDTHS if w % GROUP == 0])
def test_a_scale_for_each_group(dtype: torch.dtype, hidden_size: int) -> None:
    norm = _norms(dtype, hidden_size)
    codes = torch.empty_like(norm, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(norm), hidden_size // GROUP, device="cuda")
    KERNELS.per_token_group_fp8_quant(
        norm, codes, scales, GROUP, EPS, -448.0, 448.0, False, False, False
    )
    _assert_equal(quantise(norm, Fp8("group")), (codes, scales))
