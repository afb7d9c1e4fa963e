"""What the sources and their Python mirror both say: constants, the sentinel, definitions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fusewise.backends.native.cuda
from fusewise.backends.native import instance as compiled
from fusewise.backends.native import variants
from fusewise.backends.native.instance import Instance

KERNELS = Path(fusewise.backends.native.cuda.__file__).parent


def constant(file: str, name: str) -> int:
    """The value of a C++ constant in a kernel source."""
    found = re.search(rf"constexpr \w+ {name} = (0x[0-9a-f]+|\d+)u?;", (KERNELS / file).read_text())
    assert found, f"{name} is not in {file}"
    return int(found[1], 0)


def test_constants_agree_with_the_sources() -> None:
    assert constant("two_shot_tile.cuh", "kMaxTileRows") == variants.MAX_TILE_ROWS
    assert constant("two_shot_tile.cuh", "kMaxTileUnits") == variants.MAX_TILE_UNITS
    assert constant("two_shot_tile.cuh", "kMaxTileBlocks") == compiled.MAX_BLOCKS
    assert constant("slots.cuh", "kWarp") * constant("slots.cuh", "kVectorBytes") == 512
    assert constant("slots.cuh", "kMaxRanks") == max(compiled.WORLD_SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sentinel_and_its_stand_in_are_nan_in_every_element(dtype: torch.dtype) -> None:
    for name in ("kSentinel", "kCanonicalNan"):
        word = constant("slots.cuh", name)
        elements = torch.tensor([word - 2**32], dtype=torch.int32).view(dtype)
        assert elements.isnan().all()
    assert constant("slots.cuh", "kSentinel") != constant("slots.cuh", "kCanonicalNan")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_number_and_no_usual_nan_is_the_sentinel(dtype: torch.dtype) -> None:
    word = constant("slots.cuh", "kSentinel") - 2**32
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, tiny / 4, -tiny / 4, 1.0, float("inf"), float("-inf"), float("nan")]
    pairs = torch.tensor([[a, b] for a in values for b in values], dtype=dtype)
    assert not (pairs.view(torch.int32) == word).any()


def test_defines_are_what_the_sources_ask_for() -> None:
    names = {name for name, _ in Instance("one_shot", "bfloat16", 2).defines()}
    asked = set()
    for path in [*KERNELS.glob("*.cu"), KERNELS / "primitives.cuh"]:
        asked |= set(re.findall(r"\bFW_[A-Z_]+\b", path.read_text()))
    assert asked - {"FW_DEVICE", "FW_UNROLL", "FW_KEEP_LOOP"} == names
