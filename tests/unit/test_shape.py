"""Sizes and shapes: what is a size, and how it is written."""

from __future__ import annotations

import pytest

from fusewise.errors import InputError
from fusewise.shape import Shape, format_size, parse_dtype, parse_size, size_grid, tokens_at


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("65536", 65536), ("256K", 262144), ("256k", 262144), ("0.5M", 524288),
     ("64MiB", 64 * 2**20), ("1 GB", 2**30), ("1.5K", 1536), (4096, 4096)],
)  # fmt: skip
def test_sizes_are_read_as_nccl_tests_writes_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "K", "25x", "1.3", "0.1K", "1e6", "nan", "99999999999G", "1 2"]
)
def test_what_is_no_size_is_refused_with_the_expected_form(text: str) -> None:
    with pytest.raises(InputError, match=r"256K, 0\.5M"):
        parse_size(text)


def test_format_is_the_inverse_of_parse_for_round_sizes() -> None:
    for size in (1, 1023, 1024, 262144, 524288, 2**20, 3 * 2**20, 2**30):
        assert parse_size(format_size(size)) == size
    assert format_size(1000) == "1000B"
    assert format_size(1536) == "1.5K"


def test_dtype_names_are_torchs_short_and_long() -> None:
    assert [parse_dtype(t) for t in ("bf16", "torch.float16", "FP32")] == [
        "bfloat16", "float16", "float32",
    ]  # fmt: skip
    with pytest.raises(InputError, match="bf16, fp16 or fp32"):
        parse_dtype("fp8")


def test_message_bytes_and_token_caps() -> None:
    assert Shape(64, 2048).message_bytes == 262144
    assert Shape(3, 8, "float32").row_bytes == 32
    assert [tokens_at(262144, h) for h in (2048, 4096, 7168)] == [64, 32, 18]
    assert tokens_at(262143, 2048) == 63


@pytest.mark.parametrize(
    ("tokens", "hidden"), [(-1, 8), (1, 0), (1.5, 8), (1, 8.0), ("1", 8), (1, None)]
)
def test_a_shape_out_of_range_is_refused(tokens: int, hidden: int) -> None:
    with pytest.raises(InputError, match="shape out of range"):
        Shape(tokens, hidden)
    assert Shape(0, 1).message_bytes == 0


def test_the_grid_doubles_and_ends_at_the_maximum() -> None:
    tokens = [s.num_tokens for s in size_grid(4096, 65536, 2048, "bfloat16")]
    assert tokens == [1, 2, 4, 8, 16]
    assert [s.num_tokens for s in size_grid(4096, 50000, 2048, "bfloat16")] == [1, 2, 4, 8, 12]
    assert [s.num_tokens for s in size_grid(1, 1, 2048, "bfloat16")] == [1]
    with pytest.raises(InputError, match="size range is empty"):
        size_grid(2, 1, 8, "bfloat16")


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16"])
def test_a_shape_understands_every_name_of_its_dtype(dtype: str) -> None:
    """Two of them were kept as given, and failed in a dictionary later."""
    shape = Shape(64, 2048, dtype)  # type: ignore[arg-type]
    assert shape == Shape(64, 2048, "bfloat16")
    assert shape.message_bytes == 262144


def test_a_shape_refuses_a_dtype_nobody_knows() -> None:
    with pytest.raises(InputError, match="expected bf16, fp16 or fp32, got 'fp8'"):
        Shape(64, 2048, "fp8")  # type: ignore[arg-type]
