"""The kernels with outputs that are their inputs, as vLLM's fused operator asks for them."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fusewise.backends.native.instance import Instance

from .build import build
from .checks import assert_call_is_right, assert_group_is_idle
from .test_kernels_on_cpu import make_call, units
from .virtual_group import Call, VirtualGroup

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

INSTANCES = [
    *(Instance("one_shot", "bfloat16", world_size, vectors, blocks)
      for world_size in (2, 8) for vectors, blocks in ((1, 1), (2, 2))),
    Instance("one_shot", "float32", 4, vectors=4),
    *(Instance("two_shot", "bfloat16", world_size, early_trigger=world_size == 8)
      for world_size in (2, 4, 8)),
]  # fmt: skip


class InPlaceGroup(VirtualGroup):
    """The norm goes into x and the sum into the residual; without one, the sum goes into x."""

    def _kernel(self, rank: int, call: Call, x: Tensor, out: Tensor, residual_out: Tensor) -> None:
        used = x[: call.x[rank].nbytes]
        if call.residual is None:
            super()._kernel(rank, call, x, out, x)
            self._copy(rank, used, residual_out, call)
            return
        own = [residual.clone() for residual in call.residual]
        super()._kernel(rank, replace(call, residual=own), x, x, self._kept(own[rank]))
        self._copy(rank, used, out, call)
        self._copy(rank, own[rank], residual_out, call)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(INSTANCES, tmp_path_factory.mktemp("in_place"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_outputs_may_be_the_inputs(library: ctypes.CDLL, instance: Instance, seed: int) -> None:
    rng = random.Random(f"{instance} {seed}")
    sizes = [8, 64, 264] if instance.dtype == "float32" else [8, 64, 264, 520]
    calls = [make_call(instance, rng.choice([1, 3, 5]), rng.choice(sizes), rng) for _ in range(4)]
    group = InPlaceGroup(library, INSTANCES, instance.world_size, max(map(units, calls)))
    try:
        assert group.run(calls, seed) == "none"
    finally:
        group.close()
    for call in calls:
        assert_call_is_right(call)
    assert_group_is_idle(group)
