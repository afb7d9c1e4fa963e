"""Which kernel instance runs a shape, and with how many threads: pure functions of the shape.

A default from the shape, and named variants of it; all of one kernel share its workspace, because a
slot's place depends on neither. Every rank computes the same configuration from the same shape and
name; nothing here asks the device. ``docs/kernels.md`` has the numbers behind the constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fusewise.errors import InputError
from fusewise.shape import DType, Shape

Kernel = Literal["one_shot", "two_shot"]
Output = Literal["kSum", "kNorm", "kStaticFp8", "kTokenFp8", "kGroupFp8"]

WORLD_SIZES = (2, 4, 8)
VECTOR_BYTES = 16
WARP = 32
UNIT_BYTES = WARP * VECTOR_BYTES  # slots.cuh: one warp's vectors
MAX_BLOCKS_PER_ROW = 4  # blocks of one cluster that share a row; 8 is the portable limit
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
_CLUSTER_REGISTERS = 16  # more, where blocks of a cluster share a row
_BLOCK_SIZES = (256, 384, 512, 1024)  # how large a block may be
_MOST_AHEAD = 2  # vectors of 16 bytes that a two-shot thread asks for before it uses the first
_TWO_SHOT_THREADS = 512  # 128 registers each: eight ranks' vectors fit without spilling
# Rows are bundled into tiles only where one per block already fills the device: two blocks on each
# of the 132 SMs of H100 and H200. A constant, because tiles must be equal on all ranks.
_BUSY_BLOCKS = 264
MAX_TILE_ROWS = 16  # kMaxTileRows in two_shot_tile.cuh
# Vectors per thread. On two H100s (benchmarks/results/two_gpus) one was faster for rows of 256
# vectors (hidden 2048 in bf16) up to 8 MiB and more, for 512 up to 2 MiB; two from 896 on. With
# more ranks, which were only virtual, two from 512 on.
_TWO_VECTORS_FROM = {2: 513, 4: 512, 8: 512}
_NARROW_ABOVE_BYTES = 8 * 2**20
_WIDE_FROM = 512
_WIDE_ABOVE_BYTES = 2 * 2**20
# A wide row keeps one multiprocessor busy with (world_size - 1) copies of it. While rows are few,
# four blocks share one, from this many vectors per row on: benchmarks/results/one_gpu has the data.
_SPREAD_FROM = {2: 896, 4: 896, 8: 512}
# Up to so many num_tokens * world_size there is room for four times the blocks.
_SPREAD_RANK_ROWS = 64


@dataclass(frozen=True)
class Instance:
    """One compiled kernel: everything that is fixed at compile time."""

    kernel: Kernel
    dtype: DType
    world_size: int
    vectors: int = 1  # 16-byte vectors per thread
    blocks: int = 1  # blocks per row, one cluster
    output: Output = "kNorm"
    early_trigger: bool = False
    max_threads: int = 256
    min_blocks: int = 1
    one_row: bool = False  # every worker has one row: no loop over rows, a sixth fewer registers
    row_vectors: int = 0  # of the message; 0: known at run time only
    threads: int = 0  # of a block; 0: likewise

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
            ("FW_ONE_ROW", str(self.one_row).lower()),
            ("FW_ROW_VECTORS", str(self.row_vectors)),
            ("FW_THREADS", str(self.threads)),
        ]


@dataclass(frozen=True)
class Variant:
    """How a launch departs from the shape's default; None is as the default has it.

    Args:
        vectors: 16-byte vectors per thread.
        blocks: blocks of one cluster that share a row.
        rows_per_tile: rows that a two-shot block handles together.
        early_trigger: lets the next dependent launch begin before this one's outputs are written.
            Right only where the next kernel waits (``griddepcontrol.wait``) before it reads them.
    """

    vectors: int | None = None
    blocks: int | None = None
    rows_per_tile: int | None = None
    early_trigger: bool = False


DEFAULT = Variant()
EARLY = Variant(early_trigger=True)
VARIANTS: dict[Kernel, dict[str, Variant]] = {
    "one_shot": {
        "early": EARLY,
        "v1": Variant(vectors=1, blocks=1),
        "v2": Variant(vectors=2, blocks=1),
        "v1b4": Variant(vectors=1, blocks=4),
    },
    "two_shot": {"early": EARLY, "r1": Variant(rows_per_tile=1), "r2": Variant(rows_per_tile=2)},
}


def variant(kernel: Kernel, name: str) -> Variant:
    """The variant of that name; an empty name is the default.

    Raises:
        InputError: this version has none of that name.
    """
    if not name:
        return DEFAULT
    if name not in VARIANTS[kernel]:
        names = ", ".join(VARIANTS[kernel])
        raise InputError(f"native.{kernel} has no such variant", expected=names, got=repr(name))
    return VARIANTS[kernel][name]


def candidates(kernel: Kernel, shape: Shape, world_size: int, sm: int) -> tuple[str, ...]:
    """Names of the variants worth measuring at a shape: each launches differently.

    The early trigger is never among them: in a chain of our own calls it always looks faster, and
    in a model, between kernels that are no dependent launches, it changes nothing.
    """
    make = LaunchShape.one_shot if kernel == "one_shot" else LaunchShape.two_shot
    seen, found = {make(shape, world_size, sm, "kNorm")}, []
    for name, one in VARIANTS[kernel].items():
        try:
            launch = make(shape, world_size, sm, "kNorm", one)
        except InputError:  # too wide a row for it
            continue
        if launch not in seen and not one.early_trigger:
            seen.add(launch)
            found.append(name)
    return tuple(found)


@dataclass(frozen=True)
class LaunchShape:
    """How one instance is launched for one message; the grid is capped by what fits the device.

    Args:
        instance: what was compiled.
        threads: per block; a multiple of 32.
        workers: row workers that the shape could use; each is ``instance.blocks`` blocks.
        rows_per_tile: rows a two-shot block handles together; 1 for one-shot.
        dependent_launch: launched as a programmatic dependent of the kernel before (sm_90).
    """

    instance: Instance
    threads: int
    workers: int
    rows_per_tile: int = 1
    dependent_launch: bool = True

    @classmethod
    def one_shot(
        cls, shape: Shape, world_size: int, sm: int, output: Output, variant: Variant = DEFAULT
    ) -> LaunchShape:
        """The one-shot kernel for a shape.

        Raises:
            InputError: the row is wider than any instance, or this variant, takes.
        """
        row_vectors = vectors_per_row(shape)
        vectors, blocks = _split_row(row_vectors, shape, world_size, sm)
        vectors, blocks = variant.vectors or vectors, variant.blocks or blocks
        threads = round_up(math.ceil(row_vectors / (vectors * blocks)), WARP)
        if threads > block_limit(world_size, vectors) or (blocks > 1 and sm < 90):
            raise InputError(
                f"{vectors} vectors per thread and {blocks} blocks per row",
                expected=f"up to {block_limit(world_size, vectors)} threads; one block below sm_90",
                got=f"{threads} threads on sm_{sm}",
            )
        instance = Instance(
            "one_shot", shape.dtype, world_size, vectors, blocks, output, variant.early_trigger
        )
        exact = replace(bound(instance, threads), row_vectors=row_vectors, one_row=True)
        return cls(exact, threads, shape.num_tokens, dependent_launch=sm >= 90)

    @classmethod
    def two_shot(
        cls, shape: Shape, world_size: int, sm: int, output: Output, variant: Variant = DEFAULT
    ) -> LaunchShape:
        """The two-shot kernel for a shape. Tiles follow from the shape, so ranks agree on them."""
        row_vectors = vectors_per_row(shape)
        shard_units = units_per_row(-(-row_vectors // world_size))
        most = max(1, min(_TWO_SHOT_THREADS // WARP // shard_units, MAX_TILE_ROWS))
        rows = min(max(1, variant.rows_per_tile or shape.num_tokens // _BUSY_BLOCKS), most)
        threads = min(_TWO_SHOT_THREADS, round_up(rows * row_vectors, 2 * WARP))
        pieces = rows * shard_units * (world_size - 1)
        instance = Instance(
            "two_shot",
            shape.dtype,
            world_size,
            vectors=min(_MOST_AHEAD, -(-pieces * WARP // threads)),
            output=output,
            early_trigger=variant.early_trigger,
            max_threads=_TWO_SHOT_THREADS,
            row_vectors=row_vectors,
            threads=threads,
        )
        tiles = -(-shape.num_tokens // rows)
        return cls(instance, threads, tiles, rows, dependent_launch=sm >= 90)

    def looped(self) -> LaunchShape:
        """The same with workers that take one row after the other, as fewer fit than rows are."""
        return replace(self, instance=replace(self.instance, one_row=False))

    def grid(self, resident_workers: int) -> int:
        """Blocks to launch, given how many workers fit on the device at once.

        All blocks must be resident together: a rank's rows wait for its peers' rows.
        """
        return max(1, min(self.workers, resident_workers)) * self.instance.blocks


def bound(instance: Instance, threads: int) -> Instance:
    """The instance for blocks of that size, with launch bounds that keep it out of local memory."""
    registers = _REGISTERS[instance.world_size, instance.vectors]
    registers += _CLUSTER_REGISTERS if instance.blocks > 1 else 0
    min_blocks = max(1, _REGISTERS_PER_SM // (registers * threads))
    return replace(instance, threads=threads, max_threads=threads, min_blocks=min_blocks)


def block_limit(world_size: int, vectors: int) -> int:
    """The most threads a block may have with this many vectors per thread."""
    registers = _REGISTERS[world_size, vectors]
    return max(size for size in _BLOCK_SIZES if size * registers <= _REGISTERS_PER_SM)


def widest_row(world_size: int, sm: int) -> int:
    """Vectors of the widest row that the one-shot kernel takes."""
    blocks = MAX_BLOCKS_PER_ROW if sm >= 90 else 1
    return blocks * max(v * block_limit(world_size, v) for v in (1, 2, 4))


def _split_row(row_vectors: int, shape: Shape, world_size: int, sm: int) -> tuple[int, int]:
    """Vectors per thread and blocks per row. A cluster is preferred to four vectors per thread,
    which wait for the peers one after the other."""
    few = shape.num_tokens * world_size <= _SPREAD_RANK_ROWS
    spread = MAX_BLOCKS_PER_ROW * block_limit(world_size, 1)
    if sm >= 90 and few and _SPREAD_FROM[world_size] <= row_vectors <= spread:
        return 1, MAX_BLOCKS_PER_ROW
    wide = row_vectors >= _WIDE_FROM
    most = _WIDE_ABOVE_BYTES if wide else _NARROW_ABOVE_BYTES
    two = row_vectors >= _TWO_VECTORS_FROM[world_size] or shape.message_bytes > most
    blocks_allowed = (1, 2, MAX_BLOCKS_PER_ROW) if sm >= 90 else (1,)
    for vectors in (2, 4) if two else (1, 2, 4):
        for blocks in blocks_allowed:
            if row_vectors <= vectors * blocks * block_limit(world_size, vectors):
                return vectors, blocks
    raise InputError(
        "row too wide for the native kernels",
        expected=f"at most {widest_row(world_size, sm) * VECTOR_BYTES} bytes on sm_{sm}",
        got=f"{row_vectors * VECTOR_BYTES} bytes",
    )


def vectors_per_row(shape: Shape) -> int:
    """16-byte vectors of one row; the row must be a whole number of them."""
    return shape.row_bytes // VECTOR_BYTES


def units_per_row(row_vectors: int) -> int:
    """512-byte units that ``row_vectors`` begin."""
    return -(-row_vectors // WARP)


def round_up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-value // step) * step
