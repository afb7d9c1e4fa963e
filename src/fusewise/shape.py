"""Shapes, message bytes, and sizes as people write them (``256K``, ``0.5M``).

Pure; knows no torch. A dtype is its torch name (``"bfloat16"``) so that profiles can be read
without torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from fusewise.errors import InputError

DType = Literal["bfloat16", "float16", "float32"]

ELEMENT_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPE_ALIASES: dict[str, DType] = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32",
}  # fmt: skip

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Shape:
    """One message: ``num_tokens`` rows of ``hidden_size`` elements of ``dtype``.

    The dtype may be given as ``bf16`` or as torch's own.

    Raises:
        InputError: a number out of range or not whole, or an unknown dtype.
    """

    num_tokens: int
    hidden_size: int
    dtype: DType = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            object.__setattr__(self, "dtype", parse_dtype(str(self.dtype)))
        numbers = self.num_tokens, self.hidden_size
        whole = all(isinstance(number, Integral) for number in numbers)
        if not whole or self.num_tokens < 0 or self.hidden_size < 1:
            raise InputError(
                "shape out of range",
                expected="whole numbers, num_tokens >= 0 and hidden_size >= 1",
                got=f"num_tokens {self.num_tokens!r}, hidden_size {self.hidden_size!r}",
            )

    @property
    def message_bytes(self) -> int:
        """Bytes one rank contributes: num_tokens · hidden_size · element size."""
        return self.num_tokens * self.hidden_size * ELEMENT_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
        return self.hidden_size * ELEMENT_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.hidden_size} {self.dtype}"


def parse_dtype(text: str) -> DType:
    """``"bf16"``, ``"bfloat16"``, ``"torch.bfloat16"`` → ``"bfloat16"``.

    Raises:
        InputError: the name is none of bfloat16, float16, float32 or their short forms.
    """
    name = text.strip().lower().removeprefix("torch.")
    for dtype in ELEMENT_BYTES:
        if name == dtype:
            return dtype
    if name in DTYPE_ALIASES:
        return DTYPE_ALIASES[name]
    raise InputError("unknown dtype", expected="bf16, fp16 or fp32", got=repr(text))


def parse_size(text: str | int) -> int:
    """Bytes of a size as nccl-tests writes them: ``65536``, ``256K``, ``0.5M``, ``1 GiB``.

    Units are binary (K = 1024), as in nccl-tests and in vLLM's MB-shaped settings.

    Raises:
        InputError: not a size, not positive, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match:
        size = float(match[1]) * _UNITS[match[2].upper()]
        if size >= 1 and size.is_integer() and size < 2**62:
            return int(size)
    raise InputError(
        "not a message size", expected="bytes or a form such as 256K, 0.5M, 1G", got=repr(str(text))
    )


def format_size(size_bytes: int) -> str:
    """``262144`` → ``"256K"``; sizes that are no round number keep three digits."""
    for unit in ("G", "M", "K"):
        if size_bytes >= _UNITS[unit]:
            value = size_bytes / _UNITS[unit]
            return f"{value:.0f}{unit}" if value.is_integer() else f"{value:.4g}{unit}"
    return f"{size_bytes}B"


def tokens_at(size_bytes: int, hidden_size: int, dtype: DType = "bfloat16") -> int:
    """How many whole tokens fit in ``size_bytes``: an engine's token cap."""
    return size_bytes // (hidden_size * ELEMENT_BYTES[dtype])


def size_grid(min_bytes: int, max_bytes: int, hidden_size: int, dtype: DType) -> list[Shape]:
    """Doubling message sizes from ``min_bytes`` to ``max_bytes``, rounded to whole tokens."""
    if not 0 < min_bytes <= max_bytes:
        raise InputError(
            "size range is empty", expected="0 < min <= max", got=f"{min_bytes}..{max_bytes}"
        )
    row_bytes = hidden_size * ELEMENT_BYTES[dtype]
    sizes: list[int] = []
    size = min_bytes
    while size < max_bytes:
        sizes.append(size)
        size *= 2
    tokens = sorted({max(1, s // row_bytes) for s in [*sizes, max_bytes]})
    return [Shape(t, hidden_size, dtype) for t in tokens]
