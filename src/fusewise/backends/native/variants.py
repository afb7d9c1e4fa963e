"""Which kernel instance runs a shape, and with how many threads: pure functions of the shape.

A default from the shape, and named variants of it; all of one kernel share its workspace, because a
slot's place depends on neither. Every rank computes the same configuration from the same shape and
name; nothing here asks the device. ``docs/kernels.md`` has the numbers behind the constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from fusewise.backends.native.instance import (
    MAX_BLOCKS,
    VECTOR_BYTES,
    WARP,
    Instance,
    Kernel,
    Output,
    block_limit,
    bound,
    round_up,
    units_per_row,
    vectors_per_row,
)
from fusewise.errors import InputError
from fusewise.shape import Shape

_MOST_AHEAD = 2  # vectors of 16 bytes that a two-shot thread asks for before it uses the first
_TWO_SHOT_THREADS = 512  # 128 registers each: eight ranks' vectors fit without spilling
# Rows are bundled into tiles only where one per block already fills the device: two blocks on each
# of the 132 SMs of H100 and H200. A constant, because tiles must be equal on all ranks.
_BUSY_BLOCKS = 264
MAX_TILE_ROWS = 16  # kMaxTileRows in two_shot_tile.cuh
MAX_TILE_UNITS = 256  # kMaxTileUnits there
# Of two ranks: a block's vectors from which a thread has two. On two GPUs
# (benchmarks/results/two_gpus) one was faster for 512 vectors and, by 7 %, for 448 where two blocks
# share a row; two for many rows of 896. Of four and eight ranks, which were only virtual, one was
# never slower.
_TWO_VECTORS_FROM = 513


class _Spread(NamedTuple):
    """When rows, or tiles, have several blocks each."""

    most_blocks: int  # of the launch
    least_vectors: int  # of a row, for each of its blocks
    evenly: bool = False  # whether the blocks must divide a row's units
    least_ranks: int = 2

    def allows(self, blocks: int, shape: Shape, world_size: int, units: int) -> bool:
        return (
            shape.num_tokens * blocks <= self.most_blocks
            and vectors_per_row(shape) >= blocks * self.least_vectors
            and not (self.evenly and units % blocks)
            and world_size >= self.least_ranks
        )


# Few rows are spread over several blocks each: with one, a multiprocessor moves all copies of a row
# alone. One-shot's are from two H100s: four blocks for each of 146 wide rows were a tenth ahead of
# two, and far behind at twice as many; the last is from eight virtual ranks, where up to three rows
# took 2 to 8 % less in the mean (benchmarks/results/one_gpu/virtual_node_spread.json). Two-shot's
# fit a block on each of 132 multiprocessors. With 180 vectors each, two blocks took 7 to 10 % less
# in a chain where a shard's two units were one for each, and 10 to 15 % more where it had three
# (virtual_node_blocks.json there).
_SPREAD: dict[Kernel, tuple[_Spread, ...]] = {
    "one_shot": (_Spread(300, 128), _Spread(600, 224), _Spread(12, 64, least_ranks=8)),
    "two_shot": (_Spread(132, 224), _Spread(132, 180, evenly=True)),
}


@dataclass(frozen=True)
class Variant:
    """How a launch departs from the shape's default; None is as the default has it.

    Args:
        vectors: 16-byte vectors per thread.
        blocks: blocks that share a row or, in two-shot, a tile.
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
        "v1b2": Variant(vectors=1, blocks=2),
        "v1b4": Variant(vectors=1, blocks=4),
    },
    "two_shot": {
        "early": EARLY,
        "r1": Variant(rows_per_tile=1, blocks=1),
        "r2": Variant(rows_per_tile=2, blocks=1),
        "b2": Variant(rows_per_tile=1, blocks=2),
        "b4": Variant(rows_per_tile=1, blocks=4),
    },
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
        exact = replace(instance, row_vectors=row_vectors, one_pass=True)
        return cls(bound(exact, threads), threads, shape.num_tokens, dependent_launch=sm >= 90)

    @classmethod
    def two_shot(
        cls, shape: Shape, world_size: int, sm: int, output: Output, variant: Variant = DEFAULT
    ) -> LaunchShape:
        """The two-shot kernel for a shape. Tiles follow from the shape, so ranks agree on them."""
        row_vectors = vectors_per_row(shape)
        shard_units = units_per_row(-(-row_vectors // world_size))
        most = max(1, min(_TWO_SHOT_THREADS // WARP // shard_units, MAX_TILE_ROWS))
        rows = min(max(1, variant.rows_per_tile or shape.num_tokens // _BUSY_BLOCKS), most)
        units = rows * shard_units
        blocks = variant.blocks or _spread("two_shot", shape, world_size, shard_units)
        blocks = 1 if output.endswith("Fp8") else min(blocks, units)
        own_units = -(-units // blocks)
        pieces = own_units * (world_size - 1)
        # A warp per piece, also where columns end within one.
        lanes = max(-(-rows * row_vectors // blocks), pieces * WARP)
        threads = min(_TWO_SHOT_THREADS, round_up(lanes, 2 * WARP))
        ahead = min(_MOST_AHEAD, -(-pieces * WARP // threads))
        instance = Instance(
            "two_shot",
            shape.dtype,
            world_size,
            vectors=ahead,
            blocks=blocks,
            output=output,
            early_trigger=variant.early_trigger,
            max_threads=_TWO_SHOT_THREADS,
            one_pass=max(own_units, -(-pieces // ahead)) * WARP <= threads,
            row_vectors=row_vectors,
            threads=threads,
        )
        tiles = -(-shape.num_tokens // rows)
        return cls(instance, threads, tiles, rows, dependent_launch=sm >= 90)

    def looped(self) -> LaunchShape:
        """The same with workers that take one row or tile after the other, where fewer fit."""
        looped = replace(self.instance, one_pass=False)
        one_shot = looped.kernel == "one_shot"
        return replace(self, instance=bound(looped, self.threads) if one_shot else looped)

    def grid(self, resident_workers: int) -> int:
        """Blocks to launch, given how many workers fit on the device at once.

        All blocks must be resident together: a rank's rows wait for its peers' rows.
        """
        return max(1, min(self.workers, resident_workers)) * self.instance.blocks


def widest_row(world_size: int, sm: int) -> int:
    """Vectors of the widest row that the one-shot kernel takes."""
    blocks = MAX_BLOCKS if sm >= 90 else 1
    return blocks * max(v * block_limit(world_size, v) for v in (1, 2, 4))


def _spread(kernel: Kernel, shape: Shape, world_size: int, units: int) -> int:
    """Blocks that share a row's ``units`` because rows are few: a power of two."""
    for blocks in (MAX_BLOCKS, 2):
        if any(rule.allows(blocks, shape, world_size, units) for rule in _SPREAD[kernel]):
            return blocks
    return 1


def _split_row(row_vectors: int, shape: Shape, world_size: int, sm: int) -> tuple[int, int]:
    """Vectors per thread and blocks per row: those that few rows are spread over, else the fewest.
    A cluster is preferred to four vectors per thread, which wait for the peers one by one."""
    clusters = (2, MAX_BLOCKS) if sm >= 90 else ()
    spread = _spread("one_shot", shape, world_size, units_per_row(row_vectors))
    two_from = _TWO_VECTORS_FROM if world_size == 2 else math.inf
    share = -(-row_vectors // spread)
    few = [(2 if share >= two_from else 1, spread)] if spread in clusters else []
    many = [(v, b) for v in (1, 2, 4) for b in (1, *clusters) if v > 1 or row_vectors < two_from]
    for vectors, blocks in (*few, *many):
        if row_vectors <= vectors * blocks * block_limit(world_size, vectors):
            return vectors, blocks
    raise InputError(
        "row too wide for the native kernels",
        expected=f"at most {widest_row(world_size, sm) * VECTOR_BYTES} bytes on sm_{sm}",
        got=f"{row_vectors * VECTOR_BYTES} bytes",
    )
