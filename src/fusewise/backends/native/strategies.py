"""Our own fused kernels as backends: ``native.one_shot`` and ``native.two_shot``.

One-shot sends whole rows and waits once; two-shot sends each rank its share of the columns, then
the sums, and waits twice for less data. ``docs/kernels.md`` models where each is better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fusewise.backends.native.backend import NativeBackend
from fusewise.backends.native.cuda.params import GroupParams
from fusewise.backends.native.cuda.prepare import one_shot, two_shot
from fusewise.backends.native.instance import (
    VECTOR_BYTES,
    WORLD_SIZES,
    Kernel,
    units_per_row,
    vectors_per_row,
)
from fusewise.backends.native.variants import MAX_TILE_UNITS, candidates, widest_row
from fusewise.backends.native.workspace import SlotLayout, shard_vectors
from fusewise.shape import Shape

if TYPE_CHECKING:
    from fusewise.operation import Op

# One-shot has slots for world_size copies of a message, twice: at 8 ranks 4 MiB take 64 MiB.
# Far above the sizes at which two-shot takes over (docs/kernels.md: near 167 KB and 48 KB).
_ONE_SHOT_MAX_BYTES = {2: 2**62, 4: 16 * 2**20, 8: 4 * 2**20}


class _Varied(NativeBackend):
    """A backend whose kernel has variants; they share its workspace and its votes."""

    kernel_name: ClassVar[Kernel]

    def variants(self, shape: Shape) -> tuple[str, ...]:
        return candidates(self.kernel_name, shape, self.group.world_size, self._kernels.sm)

    def select(self, op: Op, shape: Shape, variant: str) -> None:
        self.kernel(
            shape, self.group.world_size, self._kernels.sm, "kNorm", GroupParams(), variant
        )  # refuses here, not in a call
        self._selected[op != "all_reduce", shape] = variant
        self._calls.clear()


class OneShot(_Varied):
    """Every rank sends its rows to every peer; each adds and normalises all rows itself."""

    id = "native.one_shot"
    kernel_name = "one_shot"
    world_sizes = WORLD_SIZES
    kernel = staticmethod(one_shot)

    def _limited(self, shape: Shape) -> Shape:
        most = _ONE_SHOT_MAX_BYTES[self.group.world_size]
        if shape.message_bytes <= most:
            return shape
        return Shape(max(1, most // shape.row_bytes), shape.hidden_size, shape.dtype)

    def _layout(self, shape: Shape) -> SlotLayout:
        return SlotLayout.one_shot(shape, self.group.world_size)

    def admits(self, shape: Shape) -> str | None:
        widest = widest_row(self.group.world_size, self._kernels.sm)
        if vectors_per_row(shape) > widest:
            return f"rows of {shape.row_bytes} bytes, the kernel takes {widest * VECTOR_BYTES}"
        return super().admits(shape)


class TwoShot(_Varied):
    """Every rank reduces its share of the columns and sends the sums to every peer."""

    id = "native.two_shot"
    kernel_name = "two_shot"
    world_sizes = (4, 8)  # two ranks would send the same bytes as one-shot, in two trips
    kernel = staticmethod(two_shot)

    def _layout(self, shape: Shape) -> SlotLayout:
        return SlotLayout.two_shot(shape, self.group.world_size)

    def admits(self, shape: Shape) -> str | None:
        units = units_per_row(shard_vectors(shape, self.group.world_size))
        if units > MAX_TILE_UNITS:
            return f"{units} units of a rank's columns in a row, the kernel takes {MAX_TILE_UNITS}"
        return super().admits(shape)
