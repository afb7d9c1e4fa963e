"""What a tune measures. Checked once, here; knows no torch, so the command line can build it."""

from __future__ import annotations

from dataclasses import dataclass

from fusewise.errors import InputError
from fusewise.shape import DType, Shape, format_size

MIN_ROUNDS = 5  # of fewer, an interval is little more than the observations themselves
ROUNDS = 21  # odd: the median is an observation; 95 % of the bootstrap lies within ranks 6..16
# The hidden sizes of vLLM issue 44079 and of the packaged two-GPU profile.
GPU_HIDDEN_SIZES = (2048, 4096, 7168)
CPU_HIDDEN_SIZES = (2048, 4096)
GPU_MAX_BYTES = 64 * 2**20  # where the published engine tables end
CPU_MAX_BYTES = 4 * 2**20
MIN_BYTES = 4096  # one token at hidden 2048 in bf16


@dataclass(frozen=True)
class Settings:
    """The grid, the budget and the candidates of one tune.

    Raises:
        InputError: a value out of range.
    """

    dtype: DType
    hidden_sizes: tuple[int, ...]
    min_bytes: int
    max_bytes: int
    budget_s: float
    rounds: int = ROUNDS
    without: tuple[str, ...] = ()
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        object.__setattr__(self, "without", tuple(self.without))
        if not self.hidden_sizes or any(not 8 <= h <= 65536 or h % 8 for h in self.hidden_sizes):
            raise InputError(
                "hidden sizes out of range",
                expected="multiples of 8 from 8 to 65536",
                got=str(self.hidden_sizes),
            )
        if len(set(self.hidden_sizes)) != len(self.hidden_sizes):
            raise InputError("a hidden size is named twice", got=str(self.hidden_sizes))
        if not 0 < self.min_bytes < self.max_bytes <= 2**32:
            raise InputError(
                "size range is empty",
                expected="min < max <= 4G",
                got=f"{format_size(self.min_bytes)} to {format_size(self.max_bytes)}",
            )
        least_bytes = Shape(1, max(self.hidden_sizes), self.dtype).row_bytes
        if self.max_bytes < least_bytes:
            raise InputError(
                f"the largest message is less than a row of hidden {max(self.hidden_sizes)}",
                expected=f"at least {format_size(least_bytes)}",
                got=format_size(self.max_bytes),
            )
        if not 0 < self.budget_s <= 86_400:
            raise InputError(
                "budget out of range",
                expected="more than 0 s, up to 24 h",
                got=f"{self.budget_s:g} s",
            )
        if not MIN_ROUNDS <= self.rounds <= 1001:
            expected = f"{MIN_ROUNDS} to 1001"
            raise InputError("rounds out of range", expected=expected, got=str(self.rounds))

    @property
    def max_shape(self) -> Shape:
        """What the workspaces must hold: the widest row, and messages of ``max_bytes``."""
        widest = max(self.hidden_sizes)
        row_bytes = Shape(1, widest, self.dtype).row_bytes
        return Shape(-(-self.max_bytes // row_bytes), widest, self.dtype)
