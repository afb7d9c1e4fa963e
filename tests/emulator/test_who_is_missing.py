"""Who waited in vain names the rank that is missing, not one that waits for it as well."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest

from fusewise.backends.native.variants import LaunchShape
from fusewise.shape import Shape

from .build import KERNELS, build
from .test_kernels_on_cpu import make_call, units
from .virtual_group import VirtualGroup

if TYPE_CHECKING:
    import ctypes
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# At eight ranks five units of a row have four blocks: some warps wait for sums and reduce nothing.
WIDTHS = {4: 1024, 8: 9216}
LAUNCHES = {w: LaunchShape.two_shot(Shape(1, h), w, 90, "kNorm") for w, h in WIDTHS.items()}
ONE_WARP = LaunchShape.one_shot(Shape(1, 256), 4, 90, "kNorm").instance
INSTANCES = [*(launch.instance for launch in LAUNCHES.values()), ONE_WARP]
TIMEOUT = {4: 1_000_000, 8: 2_000_000}  # steps: ranks begin apart, and a quarter of it must tell
SECOND, FIRST = "is_over(group, true)", "is_over(group)"
# What must wait longer: file, and at how many ranks it shows when it does not.
MUTANTS = {"columns": ("two_shot_pieces.cuh", 4), "sums": ("two_shot.cuh", 8)}


def built(folder: Path, mutant: str = "") -> ctypes.CDLL:
    """The kernels, asking the time after each poll; or with a wait that gives up with the first."""
    kernels = folder / "kernels"
    kernels.mkdir()
    for path in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        shutil.copy(path, kernels)
    changes = [("slots.cuh", "kPollsPerCheck = 1024", "kPollsPerCheck = 1")]
    if mutant:
        changes.append((MUTANTS[mutant][0], SECOND, FIRST))
    for file, old, new in changes:
        source = (kernels / file).read_text()
        assert old in source, f"{file} has changed: mutate it elsewhere"
        (kernels / file).write_text(source.replace(old, new))
    return build(INSTANCES, folder, kernels)


def named(library: ctypes.CDLL, world_size: int, seed: int) -> tuple[int, set[int]]:
    """A rank that never comes, and whom the others name."""
    rng = random.Random(seed)
    launch = LAUNCHES[world_size]
    call = make_call(launch.instance, 1, WIDTHS[world_size], rng)
    call.rows_per_tile, call.workers, call.threads = 1, 1, launch.threads
    group = VirtualGroup(library, INSTANCES, world_size, units(call), timeout=TIMEOUT[world_size])
    group.calm(15)
    missing = rng.randrange(world_size)
    group.kill(missing, after=0)
    assert group.run([call], seed) == "none"
    group.close()
    others = set(range(world_size)) - {missing}
    return missing, {int(group.status[rank][4]) for rank in others}


def test_the_missing_rank_is_named_by_all(tmp_path: Path) -> None:
    library = built(tmp_path)
    for world_size, seed in ((4, 0), (4, 1), (4, 2), (8, 0)):
        missing, by_others = named(library, world_size, seed)
        assert by_others == {missing}


def silent(library: ctypes.CDLL, seed: int) -> set[int]:
    """Ranks that have NaN and say nothing, after one died while it sent its row."""
    rng = random.Random(seed)
    call = make_call(ONE_WARP, 1, 256, rng)
    call.workers, call.threads = 1, 32
    group = VirtualGroup(library, INSTANCES, 4, units(call), timeout=30_000)
    missing = rng.randrange(4)
    group.kill(missing, after=rng.randint(3_000, 30_000))
    assert group.run([call], seed) == "none"
    group.close()
    return {
        rank
        for rank in set(range(4)) - {missing}
        if call.out[rank].isnan().any() and not group.status[rank][0]
    }


def test_who_waited_in_vain_says_so(tmp_path: Path) -> None:
    library = built(tmp_path)
    assert [seed for seed in range(50) if silent(library, seed)] == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_who_cannot_know_must_wait_longer(mutant: str, tmp_path: Path) -> None:
    library, world_size = built(tmp_path, mutant), MUTANTS[mutant][1]
    answers = [named(library, world_size, seed) for seed in range(2)]
    assert any(by_others != {missing} for missing, by_others in answers)
