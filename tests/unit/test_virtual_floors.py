"""The floors of the virtual node are written against our kernels' own names, so they compile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusewise.backends.native.cuda.build import missing_compiler
from fusewise.shape import Shape

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from virtual_arms import floor, launch_shape
from virtual_floors import FLOORS

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason="needs cuda.core")


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("name", FLOORS)
def test_floors_compile(name: str, world_size: int) -> None:
    patch = floor(name)
    launch = launch_shape(patch, Shape(2, 2048), world_size, 90)
    assert patch.machine_code(launch.instance, 90)
