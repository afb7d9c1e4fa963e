"""A compiled kernel: what is fixed at compile time, and how many threads it can have. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fusewise.shape import DType, Shape

Kernel = Literal["one_shot", "two_shot"]
Output = Literal["kSum", "kNorm", "kStaticFp8", "kTokenFp8", "kGroupFp8"]

WORLD_SIZES = (2, 4, 8)
VECTOR_BYTES = 16
WARP = 32
UNIT_BYTES = WARP * VECTOR_BYTES  # slots.cuh: one warp's vectors
# Blocks that share a row or a tile: of one cluster in one-shot, where 8 is the portable limit; in
# two-shot kMaxTileBlocks of two_shot_tile.cuh.
MAX_BLOCKS = 4
_CPP_TYPES: dict[DType, str] = {
    "bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32",
}  # fmt: skip
_REGISTERS_PER_SM = 65536  # every architecture from sm_80 to sm_100
# Registers a thread may use without spilling: (world_size, vectors) → count, as ptxas reports them
# for sm_80, which needs most. A test compiles them and fails when one spills.
_REGISTERS = {
    (2, 1): 48, (2, 2): 72, (2, 4): 128,
    (4, 1): 64, (4, 2): 104, (4, 4): 168,
    (8, 1): 80, (8, 2): 128, (8, 4): 256,
}  # fmt: skip
# And where each worker has one row, if that is enough fewer for another block to fit: it takes 60
# to 64 then, and 72 if it may.
_ONE_PASS_REGISTERS = {(8, 1): 64}
_BLOCK_SIZES = (256, 384, 512, 1024)  # how large a block may be


@dataclass(frozen=True)
class Instance:
    """One compiled kernel: everything that is fixed at compile time."""

    kernel: Kernel
    dtype: DType
    world_size: int
    vectors: int = 1  # 16-byte vectors per thread
    blocks: int = 1  # that share a row or a tile
    output: Output = "kNorm"
    early_trigger: bool = False
    max_threads: int = 256
    min_blocks: int = 1
    # Every worker has one row, or one tile in which no warp has more than it has under way at once:
    # no loops, so fewer registers: up to an eighth in one-shot to four ranks, a fifth to two fifths
    # in two-shot.
    one_pass: bool = False
    row_vectors: int = 0  # of the message; 0: known at run time only
    threads: int = 0  # of a block; 0: likewise

    @property
    def cluster(self) -> int:
        """Blocks of one cluster."""
        return self.blocks if self.kernel == "one_shot" else 1

    @property
    def function(self) -> str:
        """The kernel's name in its cubin."""
        return f"fusewise_{self.kernel}"

    def defines(self) -> list[tuple[str, str]]:
        """What the source is compiled with."""
        return [
            ("FW_TYPE", _CPP_TYPES[self.dtype]),
            ("FW_WORLD", str(self.world_size)),
            ("FW_VECTORS", str(self.vectors)),
            ("FW_BLOCKS", str(self.blocks)),
            ("FW_OUTPUT", self.output),
            ("FW_EARLY_TRIGGER", str(self.early_trigger).lower()),
            ("FW_MAX_THREADS", str(self.max_threads)),
            ("FW_MIN_BLOCKS", str(self.min_blocks)),
            ("FW_ONE_PASS", str(self.one_pass).lower()),
            ("FW_ROW_VECTORS", str(self.row_vectors)),
            ("FW_THREADS", str(self.threads)),
        ]


def bound(instance: Instance, threads: int) -> Instance:
    """The instance for blocks of that size, with launch bounds that keep it out of local memory."""
    size = instance.world_size, instance.vectors
    registers = _REGISTERS[size]
    if instance.one_pass:
        registers = _ONE_PASS_REGISTERS.get(size, registers)
    min_blocks = max(1, _REGISTERS_PER_SM // (registers * threads))
    return replace(instance, threads=threads, max_threads=threads, min_blocks=min_blocks)


def block_limit(world_size: int, vectors: int) -> int:
    """The most threads a block may have with this many vectors per thread."""
    registers = _REGISTERS[world_size, vectors]
    return max(size for size in _BLOCK_SIZES if size * registers <= _REGISTERS_PER_SM)


def sources_of(world_size: int) -> int:
    """Slots of one unit and phase (kSources in slots.cuh): one per rank, of two ranks one."""
    return world_size if world_size > 2 else 1


def vectors_per_row(shape: Shape) -> int:
    """16-byte vectors of one row; the row must be a whole number of them."""
    return shape.row_bytes // VECTOR_BYTES


def units_per_row(row_vectors: int) -> int:
    """512-byte units that ``row_vectors`` begin."""
    return -(-row_vectors // WARP)


def round_up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-value // step) * step
