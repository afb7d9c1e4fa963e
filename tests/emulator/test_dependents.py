"""The rule for what runs behind our kernels: who does not wait may follow the late trigger only."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest

from fusewise.backends.native.instance import Instance

from .build import build
from .checks import assert_call_is_right
from .test_kernels_on_cpu import make_call, units
from .virtual_group import Call, VirtualGroup

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

INSTANCES = [
    Instance(kernel, "bfloat16", 2, early_trigger=early)
    for kernel in ("one_shot", "two_shot")
    for early in (False, True)
]


class HastyGroup(VirtualGroup):
    """Behind the call a dependent launch copies its norm without waiting for it."""

    def _enqueue(self, rank: int, calls: list[Call]) -> None:
        self._behind = False
        super()._enqueue(rank, calls)

    def _kernel(self, rank: int, call: Call, x: Tensor, out: Tensor, residual_out: Tensor) -> None:
        super()._kernel(rank, call, x, out, residual_out)
        self._copy(rank, out, call.out[rank], call, hasty=True)
        self._behind = True

    def _copy(
        self, rank: int, source: Tensor, target: Tensor, call: Call, hasty: bool = False
    ) -> None:
        if not (self._behind and target is call.out[rank]):  # the copy that waits is left out
            super()._copy(rank, source, target, call, hasty)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(INSTANCES, tmp_path_factory.mktemp("dependents"))


def is_right(library: ctypes.CDLL, instance: Instance, seed: int) -> bool:
    """Whether a hasty dependent of one call found the whole norm."""
    call = make_call(instance, 3, 264, random.Random(seed))
    call.dependent = True
    group = HastyGroup(library, INSTANCES, 2, units(call))
    try:
        assert group.run([call], seed) == "none"
    finally:
        group.close()
    try:
        assert_call_is_right(call)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_a_dependent_that_does_not_wait_reads_whole_outputs_behind_a_late_trigger_only(
    library: ctypes.CDLL, instance: Instance
) -> None:
    found = [is_right(library, instance, seed) for seed in range(12)]
    assert all(found) == (not instance.early_trigger), found
