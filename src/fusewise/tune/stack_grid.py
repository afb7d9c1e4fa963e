"""Which cases ``fusewise verify`` runs. Checked once, here; knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusewise.errors import InputError
from fusewise.shape import ELEMENT_BYTES, DType, Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewise.operation import Op
    from fusewise.tune.operands import Case, Values

# What models of the last years have, and 2880: no power of two divides it (gpt-oss).
HIDDEN_SIZES = (2048, 2880, 4096, 5120, 7168, 8192)
DTYPES: tuple[DType, ...] = tuple(ELEMENT_BYTES)
# Every small batch, then sizes that fill no tile evenly.
TOKENS = (*range(1, 18), 31, 64, 129, 509)
FEW_TOKENS = (1, 2, 3, 7, 8, 17, 64, 129)


@dataclass(frozen=True)
class StackGrid:
    """The grid and the candidates of one verification.

    Raises:
        InputError: a hidden size out of range.
    """

    dtypes: tuple[DType, ...] = DTYPES
    hidden_sizes: tuple[int, ...] = HIDDEN_SIZES
    tokens: tuple[int, ...] = TOKENS
    only: tuple[str, ...] = ()
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("dtypes", "hidden_sizes", "tokens", "only"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.hidden_sizes or any(not 8 <= h <= 65536 or h % 8 for h in self.hidden_sizes):
            raise InputError(
                "hidden sizes out of range",
                expected="multiples of 8 from 8 to 65536",
                got=str(self.hidden_sizes),
            )
        # fp32 last and together: what is built for the narrow dtypes is built anew for it.
        wide = tuple(sorted(dict.fromkeys(self.dtypes), key=lambda d: d == "float32"))
        object.__setattr__(self, "dtypes", wide)

    def max_shape(self, dtype: DType) -> Shape:
        """What the workspaces must hold."""
        return Shape(max(self.tokens), max(self.hidden_sizes), dtype)

    def cases(self, dtype: DType, hidden_size: int, ops: Sequence[Op]) -> list[Case]:
        """All calls at one dtype and hidden size: every number of tokens, and every form once."""
        from fusewise.tune.operands import Case, usual

        shapes = [Shape(count, hidden_size, dtype) for count in self.tokens]
        cases = [usual(op, shape, shape.num_tokens) for shape in shapes for op in ops]
        middle, several = (
            shapes[len(shapes) // 2],
            Shape(min(10, max(self.tokens)), hidden_size, dtype),
        )
        for op in ops:
            other: Values = "normals" if op == "all_reduce" else "integers"  # than the usual case's
            cases += [Case(op, several, 3, "special"), Case(op, middle, 4, other)]
        norm: Op = "all_reduce_rms_norm"
        return [
            *cases,
            Case(norm, middle, 1, with_residual=False),
            Case(norm, middle, 2, weight_bias=1.0),
        ]
