"""Our CUDA sources compile for every architecture, without spills, to the layout Python expects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from fusewise.backends.native.cuda import build, params
from fusewise.backends.native.instance import Instance, bound
from fusewise.backends.native.variants import LaunchShape
from fusewise.errors import UnavailableError
from fusewise.shape import Shape
from tests.emulator.virtual import layout_checks, virtual_code

pytest.importorskip("cuda.core", reason='needs pip install "fusewise[cuda]"')

ARCHITECTURES = (80, 90, 100)
# Every kernel file, element type, world size, vector count and kind of output once, for widths
# that leave a tail and that do not.
INSTANCES = [
    bound(Instance("one_shot", "bfloat16", 2, row_vectors=256), 256),
    bound(Instance("one_shot", "float16", 4, 2, output="kTokenFp8", row_vectors=1000), 512),
    bound(Instance("one_shot", "float32", 8, 4, output="kGroupFp8", row_vectors=1000), 256),
    bound(Instance("one_shot", "float16", 4, 4, row_vectors=1536), 384),
    bound(Instance("one_shot", "bfloat16", 8, output="kSum", row_vectors=512), 512),
    Instance("two_shot", "bfloat16", 8, 2, max_threads=512, row_vectors=896, threads=512),
    Instance("two_shot", "float32", 4, output="kStaticFp8", max_threads=512),
]
TWO_SHOT = INSTANCES[5]
# Where a row has one vector per thread it has the fewest registers.
CLUSTERS = [
    bound(Instance("one_shot", "bfloat16", 2, vectors=2, blocks=2), 512),
    bound(Instance("one_shot", "float16", 4, blocks=4, output="kTokenFp8", row_vectors=1000), 256),
    bound(Instance("one_shot", "float32", 8, blocks=2, output="kGroupFp8", row_vectors=1000), 512),
    Instance("two_shot", "bfloat16", 8, 2, blocks=4, max_threads=512, row_vectors=1024),
]
# As they are launched: for one width, with and without a loop over rows.
SHIPPED = [
    LaunchShape.one_shot(Shape(tokens, hidden), world_size, 90, "kNorm")
    for tokens, hidden in ((16, 2048), (1, 7168), (128, 7168), (64, 2880))
    for world_size in (2, 8)
]
VIRTUAL = [
    Instance("one_shot", "bfloat16", 8, max_threads=512),
    Instance("two_shot", "bfloat16", 4, max_threads=512),
]


def short(instance: Instance) -> str:
    return f"{instance.kernel}-{instance.dtype}-{instance.world_size}-{instance.output}"


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("instance", INSTANCES, ids=short)
def test_it_compiles_without_spilling_registers(instance: Instance, sm: int) -> None:
    assert_clean(instance, sm)


@pytest.mark.parametrize("instance", CLUSTERS, ids=short)
def test_blocks_that_share_a_row_compile(instance: Instance) -> None:
    assert_clean(instance, 90)


@pytest.mark.parametrize("launch", SHIPPED, ids=lambda launch: short(launch.instance))
def test_what_is_launched_compiles_without_spilling_registers(launch: LaunchShape) -> None:
    assert_clean(launch.instance, 90)
    assert_clean(launch.looped().instance, 90)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    ("hidden_size", "dtype", "output"),
    [
        (2048, "bfloat16", "kTokenFp8"),
        (2048, "float32", "kGroupFp8"),
        (2880, "bfloat16", "kStaticFp8"),  # its loop spills with 64 registers on sm_90
    ],
)
def test_where_registers_are_fewest_nothing_spills(
    hidden_size: int, dtype: Any, output: Any, sm: int
) -> None:
    launch = LaunchShape.one_shot(Shape(16, hidden_size, dtype), 8, sm, output)
    assert_clean(launch.instance, sm)
    assert_clean(launch.looped().instance, sm)


@pytest.mark.parametrize("instance", VIRTUAL, ids=short)
def test_virtual_ranks_compile(instance: Instance) -> None:
    assert_clean(instance, 90, virtual_code)


def assert_clean(
    instance: Instance, sm: int, compiled: Callable[..., bytes] = build.compile_instance
) -> None:
    log: list[str] = []
    code = compiled(instance, sm, log=log)
    assert code.startswith(b"\x7fELF")
    assert instance.function.encode() in code
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log[0])
    assert spills and set(spills) == {"0"}, log[0]


def test_parameters_lie_where_the_compiler_puts_them() -> None:
    common = [params.Status, params.GroupParams, params.OutputParams]
    for instance, own in ((INSTANCES[0], params.OneShotParams), (TWO_SHOT, params.TwoShotParams)):
        checks = [check for one in [*common, own] for check in layout_checks(one)]
        assert build.compile_instance(instance, 90, extra="\n".join(checks))


def test_a_wrong_layout_is_refused_by_the_compiler() -> None:
    with pytest.raises(UnavailableError, match="static assertion failed"):
        build.compile_instance(INSTANCES[0], 90, extra="static_assert(sizeof(Status) == 24);")
