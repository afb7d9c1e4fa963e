"""Which instance runs a shape: both sides of every boundary."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fusewise.backends.native.cuda
from fusewise.backends.native import instance as compiled
from fusewise.backends.native import variants
from fusewise.backends.native.instance import block_limit
from fusewise.backends.native.variants import LaunchShape, widest_row
from fusewise.errors import InputError
from fusewise.operation import PATH_PATTERN, backend_of, variant_of, variant_path
from fusewise.shape import Shape

KERNELS = Path(fusewise.backends.native.cuda.__file__).parent
MIB = 2**20


def one_shot(num_tokens: int, hidden_size: int, world_size: int = 2, sm: int = 90) -> LaunchShape:
    return LaunchShape.one_shot(Shape(num_tokens, hidden_size), world_size, sm, "kNorm")


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "vectors", "threads"),
    [
        (151, 2048, 1, 256),  # more rows than are spread
        (9999, 2048, 1, 256),
        (1, 2040, 1, 256),  # 255 vectors, too narrow to be spread
        (301, 4096, 1, 512),  # 512 vectors: the widest with one
        (301, 4104, 2, 288),
        (151, 2880, 1, 384),  # 360 vectors: the last warp is partly idle
        (301, 7168, 2, 448),
        (1, 8, 1, 32),
        (301, 8192, 2, 512),
    ],
)
def test_vectors_and_threads_of_one_shot(
    num_tokens: int, hidden_size: int, vectors: int, threads: int
) -> None:
    launch = one_shot(num_tokens, hidden_size)
    assert (launch.instance.vectors, launch.threads) == (vectors, threads)
    assert launch.instance.blocks == 1
    assert launch.instance.max_threads == launch.instance.threads == launch.threads
    assert launch.instance.one_pass and not launch.looped().instance.one_pass


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "world_size", "sm", "blocks"),
    [
        (75, 4096, 2, 90, 4),  # 300 blocks, 128 vectors each
        (76, 4096, 2, 90, 2),
        (300, 4096, 2, 90, 2),  # 600 blocks
        (301, 4096, 2, 90, 1),
        (150, 7168, 8, 90, 4),  # 600 blocks, 224 vectors each
        (151, 7168, 8, 90, 2),
        (1, 4088, 4, 90, 2),  # 511 vectors
        (150, 2048, 4, 90, 2),
        (150, 3576, 2, 90, 2),  # 447 vectors: 300 blocks may be narrower than 600
        (151, 3576, 2, 90, 1),
        (3, 2048, 8, 90, 4),  # 12 blocks, 64 vectors each
        (4, 2048, 8, 90, 2),
        (3, 2040, 8, 90, 2),
        (6, 1024, 8, 90, 2),
        (7, 1024, 8, 90, 1),
        (1, 1016, 8, 90, 1),
        (1, 2040, 4, 90, 1),  # of eight ranks only
        (1, 7168, 2, 80, 1),  # no clusters
    ],
)
def test_few_rows_are_spread_over_blocks(
    num_tokens: int, hidden_size: int, world_size: int, sm: int, blocks: int
) -> None:
    assert one_shot(num_tokens, hidden_size, world_size, sm).instance.blocks == blocks


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "output", "blocks"),
    [
        (33, 7168, "kNorm", 4),  # 132 blocks, 224 vectors each
        (34, 7168, "kNorm", 2),
        (33, 7160, "kNorm", 2),
        (66, 8192, "kSum", 2),
        (67, 8192, "kSum", 1),
        (1, 3584, "kNorm", 2),
        (1, 3576, "kNorm", 2),  # four units: two each
        (1, 2880, "kNorm", 1),  # three units
        (1, 8192, "kTokenFp8", 1),  # looks at whole rows
    ],
)
def test_few_tiles_are_spread_over_blocks(
    num_tokens: int, hidden_size: int, output: Any, blocks: int
) -> None:
    launch = LaunchShape.two_shot(Shape(num_tokens, hidden_size), 4, 90, output)
    assert (launch.instance.blocks, launch.instance.cluster) == (blocks, 1)
    assert launch.grid(7) == 7 * blocks or num_tokens < 7


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "blocks"),
    [(66, 2880, 2), (67, 2880, 1), (1, 2872, 1)],  # two units of each owner
)
def test_blocks_may_have_less_where_they_share_evenly(
    num_tokens: int, hidden_size: int, blocks: int
) -> None:
    shape = Shape(num_tokens, hidden_size)
    assert LaunchShape.two_shot(shape, 8, 90, "kNorm").instance.blocks == blocks


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "vectors", "blocks", "threads"),
    [
        (150, 7168, 1, 4, 224),
        (151, 7168, 1, 2, 448),
        (300, 8192, 1, 2, 512),  # 512 vectors of each block's: the most with one
        (300, 8200, 2, 2, 288),
        (150, 16384, 1, 4, 512),
        (150, 16392, 2, 4, 288),
    ],
)
def test_a_thread_has_two_vectors_where_its_block_has_many(
    num_tokens: int, hidden_size: int, vectors: int, blocks: int, threads: int
) -> None:
    launch = one_shot(num_tokens, hidden_size)
    assert (launch.instance.vectors, launch.instance.blocks) == (vectors, blocks)
    assert launch.threads == threads


@pytest.mark.parametrize(
    ("hidden_size", "sm", "vectors", "blocks", "threads"),
    [
        (8192, 90, 2, 1, 512),
        (8200, 90, 2, 2, 288),  # 1025 vectors: more than 2 x 512
        (16384, 90, 2, 2, 512),
        (16392, 90, 2, 4, 288),
        (32768, 90, 2, 4, 512),
        (32776, 90, 4, 4, 288),
        (8192, 80, 2, 1, 512),
        (8200, 80, 4, 1, 288),  # no clusters
        (16384, 80, 4, 1, 512),
    ],
)
def test_wide_rows_take_a_cluster_where_there_are_any(
    hidden_size: int, sm: int, vectors: int, blocks: int, threads: int
) -> None:
    launch = one_shot(301, hidden_size, sm=sm)
    assert (launch.instance.vectors, launch.instance.blocks) == (vectors, blocks)
    assert launch.threads == threads


@pytest.mark.parametrize(("sm", "blocks"), [(80, 1), (90, 4), (100, 4)])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_widest_row_runs_and_the_next_is_refused(sm: int, blocks: int, world_size: int) -> None:
    widest = 8 * widest_row(world_size, sm)
    launch = one_shot(1, widest, world_size, sm)
    assert launch.instance.blocks == blocks
    with pytest.raises(InputError, match="row too wide"):
        one_shot(1, widest + 8, world_size, sm)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("hidden_size", [8, 64, 2048, 2880, 3584, 5120, 7168, 8192, 16384])
def test_every_vector_of_a_row_has_a_thread(hidden_size: int, world_size: int) -> None:
    launch = one_shot(3, hidden_size, world_size)
    instance = launch.instance
    reached = launch.threads * instance.vectors * instance.blocks
    assert reached * 8 >= hidden_size
    assert launch.threads % 32 == 0
    assert instance.max_threads <= block_limit(world_size, instance.vectors)
    size = world_size, instance.vectors
    looped = compiled._REGISTERS[size]
    for each, registers in (
        (instance, compiled._ONE_PASS_REGISTERS.get(size, looped)),
        (launch.looped().instance, looped),
    ):
        assert each.max_threads * each.min_blocks * registers <= 65536


def test_dependent_launch_needs_sm_90() -> None:
    assert not one_shot(1, 2048, sm=89).dependent_launch
    assert one_shot(1, 2048, sm=90).dependent_launch
    assert not LaunchShape.two_shot(Shape(1, 2048), 4, 89, "kNorm").dependent_launch


@pytest.mark.parametrize(("resident", "grid"), [(0, 1), (1, 1), (99, 99), (100, 100), (101, 100)])
def test_the_grid_never_exceeds_what_is_resident(resident: int, grid: int) -> None:
    assert one_shot(100, 1024).grid(resident) == grid


def test_a_cluster_counts_as_one_worker() -> None:
    assert one_shot(100, 8200).grid(7) == 28


@pytest.mark.parametrize(
    ("num_tokens", "rows", "tiles"),
    [(1, 1, 1), (527, 1, 527), (528, 2, 264), (529, 2, 265), (4223, 15, 282), (4224, 16, 264),
     (100_000, 16, 6250)],
)  # fmt: skip
def test_tiles_of_two_shot_grow_when_the_device_is_full(
    num_tokens: int, rows: int, tiles: int
) -> None:
    launch = LaunchShape.two_shot(Shape(num_tokens, 2048), 8, 90, "kNorm")
    assert (launch.rows_per_tile, launch.workers) == (rows, tiles)


@pytest.mark.parametrize("hidden_size", [8, 2880, 8192, 65536])
@pytest.mark.parametrize("world_size", [4, 8])
def test_a_tile_fits_its_shared_memory(hidden_size: int, world_size: int) -> None:
    launch = LaunchShape.two_shot(Shape(100_000, hidden_size), world_size, 90, "kNorm")
    units = compiled.units_per_row(compiled.round_up(hidden_size // 8, world_size) // world_size)
    assert launch.rows_per_tile * units <= variants.MAX_TILE_UNITS
    assert launch.rows_per_tile <= variants.MAX_TILE_ROWS
    assert 64 <= launch.threads <= launch.instance.max_threads


@pytest.mark.parametrize(
    ("kernel", "shape", "world_size", "sm", "names"),
    [
        ("one_shot", Shape(16, 2048), 2, 90, {"v1", "v2", "v1b4"}),
        ("one_shot", Shape(16, 2048), 2, 80, {"v2"}),  # no clusters
        ("one_shot", Shape(40, 8200), 2, 90, {"v1b2"}),  # 1025 vectors: too many threads for v1
        ("two_shot", Shape(16, 2048), 8, 90, {"r2"}),
        ("two_shot", Shape(600, 2048), 8, 90, {"r1"}),
        ("two_shot", Shape(16, 65536), 4, 90, {"r1", "b2"}),  # a row fills a tile
    ],
)
def test_candidates_launch_differently_and_take_the_row(
    kernel: Any, shape: Shape, world_size: int, sm: int, names: set[str]
) -> None:
    found = variants.candidates(kernel, shape, world_size, sm)
    assert set(found) == names
    make = getattr(LaunchShape, kernel)
    launches = {make(shape, world_size, sm, "kNorm")} | {
        make(shape, world_size, sm, "kNorm", variants.variant(kernel, name)) for name in found
    }
    assert len(launches) == 1 + len(found)


@pytest.mark.parametrize("kernel", ["one_shot", "two_shot"])
def test_the_early_trigger_is_there_and_never_a_candidate(kernel: Any) -> None:
    early = variants.variant(kernel, "early")
    shape = Shape(16, 4096)
    launch = getattr(LaunchShape, kernel)(shape, 4, 90, "kNorm", early)
    default = getattr(LaunchShape, kernel)(shape, 4, 90, "kNorm")
    assert launch.instance.early_trigger and not default.instance.early_trigger
    assert launch.threads == default.threads
    assert "early" not in variants.candidates(kernel, shape, 4, 90)


def test_a_variant_that_does_not_take_the_row_is_refused() -> None:
    with pytest.raises(InputError, match="1 vectors per thread and 1 blocks per row"):
        LaunchShape.one_shot(Shape(1, 16384), 2, 90, "kNorm", variants.variant("one_shot", "v1"))
    with pytest.raises(InputError, match="one block below sm_90"):
        LaunchShape.one_shot(Shape(1, 2048), 2, 80, "kNorm", variants.variant("one_shot", "v1b4"))
    with pytest.raises(InputError, match="no such variant"):
        variants.variant("two_shot", "v1")


def test_variant_names_are_good_in_a_path() -> None:
    for kernel, named in variants.VARIANTS.items():
        for name in named:
            path = variant_path(f"native.{kernel}", name)
            assert re.fullmatch(PATH_PATTERN, path)
            assert (backend_of(path), variant_of(path)) == (f"native.{kernel}", name)
