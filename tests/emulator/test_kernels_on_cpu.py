"""The kernels' own sources under a random scheduler: right, alike on all ranks, never stuck."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from fusewise.backends.native.instance import VECTOR_BYTES, WARP, Instance, units_per_row

from .build import build
from .checks import assert_call_is_right, assert_group_is_idle
from .virtual_group import POISON, Call, VirtualGroup

if TYPE_CHECKING:
    import ctypes

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INSTANCES = [
    *(Instance("one_shot", "bfloat16", world_size, vectors, blocks, early_trigger=vectors == blocks)
      for world_size in (2, 4, 8) for vectors in (1, 2) for blocks in (1, 2)),
    *(Instance("one_shot", dtype, 2, output=output)
      for dtype in ("bfloat16", "float16", "float32")
      for output in ("kNorm", "kSum", "kStaticFp8", "kTokenFp8", "kGroupFp8")),
    Instance("one_shot", "bfloat16", 2, blocks=2, output="kTokenFp8"),
    Instance("one_shot", "float32", 4, vectors=4),
    Instance("one_shot", "float16", 8, vectors=4, early_trigger=True),
    *(Instance("two_shot", "bfloat16", world_size, early_trigger=early)
      for world_size in (2, 4, 8) for early in (False, True)),
    *(Instance("two_shot", dtype, 4, output=output)
      for dtype in ("bfloat16", "float32") for output in ("kSum", "kTokenFp8", "kGroupFp8")),
    Instance("two_shot", "float16", 8, 2),
    Instance("two_shot", "bfloat16", 8, output="kStaticFp8"),
    Instance("two_shot", "float16", 4, output="kSum"),
    # For one width and one row per worker, as they are launched.
    Instance("one_shot", "bfloat16", 2, one_pass=True, row_vectors=32),
    Instance("one_shot", "bfloat16", 4, blocks=4, one_pass=True, row_vectors=65),
    Instance("one_shot", "float32", 8, 2, one_pass=True, row_vectors=33),
    Instance("two_shot", "bfloat16", 4, 2, blocks=4, row_vectors=65),
    Instance("two_shot", "bfloat16", 4, 2, one_pass=True, row_vectors=65),
    Instance("two_shot", "float16", 8, blocks=2, one_pass=True, row_vectors=300),
    Instance("two_shot", "bfloat16", 8, blocks=2, one_pass=True, row_vectors=360),  # equal shards
    Instance("two_shot", "bfloat16", 4, one_pass=True, row_vectors=128),  # and full units
    Instance("two_shot", "bfloat16", 8, 2, row_vectors=33),
    # Blocks that share a tile.
    Instance("two_shot", "bfloat16", 2, blocks=2),
    Instance("two_shot", "bfloat16", 4, blocks=2, early_trigger=True),
    Instance("two_shot", "bfloat16", 8, blocks=4),
    Instance("two_shot", "bfloat16", 4, blocks=2, output="kSum"),
]  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(INSTANCES, tmp_path_factory.mktemp("emulator"))


def integers(shape: tuple[int, int], dtype: torch.dtype, rng: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def normals(shape: tuple[int, ...], dtype: torch.dtype, rng: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return torch.randn(shape, generator=generator).to(dtype)


def make_call(instance: Instance, num_tokens: int, hidden_size: int, rng: random.Random,
              **given: Any) -> Call:  # fmt: skip
    dtype = DTYPES[instance.dtype]
    if instance.row_vectors:
        hidden_size = instance.row_vectors * VECTOR_BYTES // dtype.itemsize
    shape = (num_tokens, hidden_size)
    values = given.pop("values", normals)
    vectors = hidden_size * dtype.itemsize // VECTOR_BYTES
    warps = -(-vectors // (WARP * instance.vectors * instance.blocks))
    rows_per_tile = 1 if instance.one_pass else rng.randint(1, 3)
    if instance.kernel == "two_shot" and instance.one_pass:
        own_units = -(-units_per_row(-(-vectors // instance.world_size)) // instance.blocks)
        warps = max(own_units, -(-own_units * (instance.world_size - 1) // instance.vectors))
    ranks = range(instance.world_size)
    residual = values(shape, dtype, rng)
    return Call(
        instance,
        x=[values(shape, dtype, rng) for _ in ranks],
        residual=[residual for _ in ranks] if rng.random() < 0.7 else None,
        weight=normals((hidden_size,), dtype, rng),
        weight_bias=rng.choice([0.0, 1.0]),
        workers=num_tokens if instance.one_pass else rng.randint(1, num_tokens + 1),
        rows_per_tile=rows_per_tile,
        threads=WARP * (warps + rng.randint(0, 1)),
        dependent=rng.random() < 0.8,
        **given,
    )


def units(call: Call) -> int:
    return call.x[0].shape[0] * call.units_per_row


def run_all(library: ctypes.CDLL, calls: list[Call], seed: int) -> VirtualGroup:
    capacity = max(map(units, calls))
    group = VirtualGroup(library, INSTANCES, calls[0].instance.world_size, capacity)
    try:
        assert group.run(calls, seed) == "none"
    finally:
        group.close()
    return group


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_calls_of_changing_shapes(library: ctypes.CDLL, world_size: int, seed: int) -> None:
    rng = random.Random(f"{world_size} {seed}")
    mixed = [v for v in INSTANCES if v.world_size == world_size and v.output in ("kNorm", "kSum")]
    values = [integers, normals][seed % 2]
    calls = [
        make_call(rng.choice(mixed), rng.choice([1, 2, 3, 5]), rng.choice([8, 64, 264, 520]), rng,
                  values=values)
        for _ in range(40 // world_size)
    ]  # fmt: skip
    group = run_all(library, calls, seed)
    for call in calls:
        assert_call_is_right(call)
    assert_group_is_idle(group)


@pytest.mark.parametrize("num_tokens", [*range(1, 18), 31])
def test_every_small_number_of_tokens(library: ctypes.CDLL, num_tokens: int) -> None:
    rng = random.Random(num_tokens)
    world_size = (2, 4, 8)[num_tokens % 3]
    fitting = [i for i in INSTANCES if i.world_size == world_size]
    calls = [make_call(rng.choice(fitting), num_tokens, 72, rng) for _ in range(2)]
    group = run_all(library, calls, num_tokens)
    for call in calls:
        assert_call_is_right(call)
    assert_group_is_idle(group)


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_block_takes_many_rows(library: ctypes.CDLL, world_size: int) -> None:
    rng = random.Random(world_size)
    fitting = [
        i for i in INSTANCES if i.world_size == world_size and i.blocks == 1 and not i.one_pass
    ]
    calls = [make_call(rng.choice(fitting), 9, 264, rng) for _ in range(16)]
    for call in calls:
        call.workers, call.rows_per_tile = 1, 1
    group = run_all(library, calls, world_size)
    for call in calls:
        assert_call_is_right(call)
    assert_group_is_idle(group)


QUANTISED = [i for i in INSTANCES if i.output.endswith("Fp8")]


@pytest.mark.parametrize("instance", QUANTISED, ids=str)
def test_fp8_equals_a_quantiser_of_the_normal_output(
    library: ctypes.CDLL, instance: Instance
) -> None:
    rng = random.Random(7)
    calls = [make_call(instance, t, h, rng) for t, h in ((3, 128), (2, 264), (1, 8), (4, 136))]
    calls[1].x[0][0] *= 1e4 if instance.dtype != "float16" else 1e3  # static scales saturate
    calls[2].x = [torch.zeros_like(x) for x in calls[2].x]  # the floor of dynamic scales
    calls[2].residual = None
    group = run_all(library, calls, 7)
    for call in calls:
        assert_call_is_right(call)
    assert_group_is_idle(group)
    alone = make_call(instance, 3, 264, rng, normal_output=False)
    beside = make_call(instance, 3, 264, rng)
    beside.x, beside.residual, beside.weight = alone.x, alone.residual, alone.weight
    beside.weight_bias = alone.weight_bias
    run_all(library, [alone, beside], 8)
    assert_call_is_right(beside)
    assert torch.equal(alone.quantised[0], beside.quantised[0])
    assert torch.equal(alone.scales[0], beside.scales[0])
    assert torch.all(alone.out[0] == POISON)


def every_kind_of_number(shape: tuple[int, ...], dtype: torch.dtype, rng: random.Random) -> Tensor:
    """Random bits of the dtype: subnormals, both zeros, infinities, NaNs; and the sentinel's."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    kind = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(kind)
    bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=kind)
    kinds = torch.randint(0, 12, shape, generator=generator)
    bits[kinds < 3] = -1  # all ones: a NaN, and two side by side are the sentinel
    bits[kinds == 3] = -2
    bits[kinds == 4] = 0
    bits[kinds == 5] = limits.min  # minus zero
    bits[kinds == 6] &= 7  # subnormal
    return bits.view(dtype)


@pytest.mark.parametrize("instance", [i for i in INSTANCES if i.output in ("kSum", "kNorm")],
                         ids=str)  # fmt: skip
def test_signed_zeros_subnormals_infinities_and_nans(
    library: ctypes.CDLL, instance: Instance
) -> None:
    rng = random.Random(3)
    calls = [make_call(instance, 3, 64, rng, values=every_kind_of_number) for _ in range(3)]
    zeros = make_call(instance, 2, 64, rng)
    for x in (*zeros.x, *(zeros.residual or ())):
        x.fill_(-0.0)
    group = run_all(library, [*calls, zeros], 3)
    for call in (*calls, zeros):
        assert_call_is_right(call)
    assert_group_is_idle(group)


def test_a_group_goes_on_after_its_streams_ran_empty(library: ctypes.CDLL) -> None:
    rng = random.Random(11)
    fitting = [i for i in INSTANCES if i.world_size == 4]
    group = VirtualGroup(library, INSTANCES, 4, unit_capacity=32)
    for seed in range(10):
        calls = [make_call(rng.choice(fitting), rng.randint(1, 4), 264, rng) for _ in range(2)]
        assert group.run(calls, seed) == "none"
        for call in calls:
            assert_call_is_right(call)
        assert_group_is_idle(group)
    group.close()


def finite_means_right(call: Call, rank: int) -> None:
    """A rank of a dead group may give NaN, or leave its output alone; never another number."""
    expected = call.sum().to(call.x[0].dtype).flatten()
    target = (call.residual_out if call.fused else call.out)[rank][: expected.numel()]
    wrong = (target != expected) & ~torch.isnan(target) & (target != POISON)
    found = target[wrong & ~torch.isnan(expected)].tolist()
    assert not found, f"rank {rank}: {found[:4]}"
    if call.fused:
        norm, got = call.norm().flatten(), call.out[rank][: expected.numel()].double()
        error = (got - norm).abs() / norm.abs().clamp_min(1e-3)
        assert not torch.any((error > 0.02) & (got != POISON)), f"rank {rank}: {error.max()}"


@pytest.mark.parametrize("seed", range(8))
def test_a_dead_rank_is_reported_and_nobody_waits_for_ever(library: ctypes.CDLL, seed: int) -> None:
    rng = random.Random(seed)
    world_size = rng.choice([2, 4, 8])
    fitting = [i for i in INSTANCES if i.world_size == world_size and i.output == "kNorm"]
    calls = [make_call(rng.choice(fitting), 2, 72, rng, values=integers) for _ in range(3)]
    group = VirtualGroup(library, INSTANCES, world_size, max(map(units, calls)), timeout=50)
    dead = rng.randrange(world_size)
    group.kill(dead, after=rng.choice([0, 300, 2000]))
    assert group.run(calls, seed) == "none"
    group.close()
    for rank in set(range(world_size)) - {dead}:
        state, who, row, phase, peer = group.status[rank].tolist()
        assert (group.dead[rank][0].item(), state, who) == (1, 1, rank)
        assert row in (0, 1) and phase in (0, 1, 2, 3)
        assert peer != rank
        for call in calls:
            finite_means_right(call, rank)


@pytest.mark.parametrize("seed", range(8))
def test_a_rank_that_gave_up_too_early_gives_no_wrong_number_to_anybody(
    library: ctypes.CDLL, seed: int
) -> None:
    rng = random.Random(seed)
    world_size = rng.choice([2, 4])
    fitting = [i for i in INSTANCES if i.world_size == world_size and i.output == "kNorm"]
    calls = [make_call(rng.choice(fitting), 2, 72, rng, values=integers) for _ in range(6)]
    group = VirtualGroup(library, INSTANCES, world_size, max(map(units, calls)), timeout=0)
    slow = rng.randrange(world_size)
    group.pause(slow, after=rng.randrange(300), steps=20_000_000)
    assert group.run(calls, seed) == "none"
    group.close()
    assert any(dead[0].item() for dead in group.dead)
    for call in calls:
        for rank in range(world_size):
            finite_means_right(call, rank)
