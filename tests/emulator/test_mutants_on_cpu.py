"""The emulator has teeth: kernels with one line broken are caught, the whole ones are not."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest

from fusewise.backends.native.instance import Instance

from .build import KERNELS, build
from .checks import assert_call_is_right, assert_group_is_idle
from .test_kernels_on_cpu import every_kind_of_number, make_call, normals, units
from .virtual_group import VirtualGroup

if TYPE_CHECKING:
    import ctypes
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

INSTANCES = [
    Instance("one_shot", "bfloat16", 2, early_trigger=True),
    Instance("two_shot", "bfloat16", 2, early_trigger=True),
    Instance("one_shot", "bfloat16", 2, output="kSum", early_trigger=True),
    Instance("one_shot", "bfloat16", 2, blocks=2, early_trigger=True),
    Instance("two_shot", "bfloat16", 2, blocks=2, early_trigger=True),
]
PLAIN_SUMS = [
    Instance("one_shot", "bfloat16", 2, output="kSum", early_trigger=True),
    Instance("two_shot", "bfloat16", 2, output="kSum", early_trigger=True),
]
STEPS = 12_000_000  # twice what a whole kernel needs, or more; a stuck one uses them up

# file, what stands there, what stands there instead
MUTANTS = {
    "none": ("slots.cuh", "", ""),
    "last_words_only": ("slots.cuh", "larger(v.word[0], v.word[1])", "0"),
    "raw_sentinel": ("slots.cuh", "smaller(word, kCanonicalNan)", "word"),
    "lost_restore": (
        "slots.cuh", "push_words(slot + i * kUnitBytes, empty_slot())", "(void)slot",
    ),
    "phases_overlap": ("slots.cuh", "2 * kSourcesBytes<kWorld>", "kSourcesBytes<kWorld>"),
    "lost_partial": ("two_shot.cuh", "      push_word(slot, kSentinel);\n", ""),
    "lost_barrier": ("two_shot.cuh", "  block_barrier();  // all of shared.squares", "  //"),
    "push_before_wait": ("one_shot.cuh", "  dependency_wait(addresses);", ""),
    "copies_send": ("one_shot.cuh", "if (part.owns(i) && !dead)", "if (part.used[i] && !dead)"),
    "emptied_before_all_took": ("one_shot.cuh", "warp_barrier();  // all lanes have what", "//"),
    "copies_scatter": ("two_shot_pieces.cuh", "!piece[j].owns() ||", "!piece[j].used ||"),
    "copies_gather": ("two_shot.cuh", "(piece.owns() && !tile.dead)", "(piece.used && !tile.dead)"),
    "copies_squared": ("two_shot.cuh", "piece.is_copy ? 0.0f : ", ""),
    "sums_emptied_before_all_took": ("two_shot.cuh", "warp_barrier();  // all lanes have", "//"),
    "columns_emptied_before_all_took": ("two_shot_pieces.cuh", "warp_barrier();  // all", "{} //"),
    "own_blocks_unheard": (
        "two_shot.cuh", "source == p.group.rank && tile.owns(unit)", "source == p.group.rank",
    ),
    "one_copy_of_a_partial": ("two_shot_tile.cuh", "kMaxTileBlocks + block", "kMaxTileBlocks"),
    "numbers_not_awaited": ("row_reduce.cuh", "inbox_await(", "(void)("),
    "nothing_expected": ("row_reduce.cuh", "inbox_expect(inbox", "(void)(inbox"),
    "start_not_awaited": ("one_shot.cuh", "turn == 0) cluster_wait();", "turn == 0) {}"),
    "turns_forgotten": ("row_reduce.cuh", "turn / 2 % 2);", "0);"),
    "copies_count": ("one_shot.cuh", "part.owns(0) ? sum_of", "true ? sum_of"),
}  # fmt: skip

# With these, lanes leave their waits one by one: the vote alone holds them together too.
LANES_ALONE = ("emptied_before_all_took", "sums_emptied_before_all_took")
VOTE = "warp_all(!needs | is_complete())"


def compiled_with(name: str) -> list[Instance]:
    """The instances that a mutant's line is for."""
    file = MUTANTS[name][0]
    if name in LANES_ALONE:
        return [instance for instance in PLAIN_SUMS if file.startswith(instance.kernel)]
    if file == "row_reduce.cuh":
        return [instance for instance in INSTANCES if instance.cluster > 1]
    return [i for i in INSTANCES if file == "slots.cuh" or file.startswith(i.kernel)]


def mutated(name: str, folder: Path) -> ctypes.CDLL:
    file, old, new = MUTANTS[name]
    kernels = folder / "kernels"
    kernels.mkdir()
    for path in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        shutil.copy(path, kernels)
    source = (kernels / file).read_text()
    assert old in source, f"{file} has changed: mutate it elsewhere"
    (kernels / file).write_text(source.replace(old, new, 1) if old else source)
    if name in LANES_ALONE:
        source = (kernels / "slots.cuh").read_text()
        assert VOTE in source, "slots.cuh has changed: mutate it elsewhere"
        (kernels / "slots.cuh").write_text(source.replace(VOTE, "(!needs | is_complete())"))
    return build(compiled_with(name), folder, kernels)


def fault_of_one_run(library: ctypes.CDLL, instances: list[Instance], seed: int) -> str:
    """What went wrong in twelve calls under one seed; empty if nothing did."""
    rng = random.Random(seed)
    values = [normals, every_kind_of_number][seed % 2]
    calls = [
        make_call(rng.choice(instances), rng.randint(1, 4), rng.choice([8, 64, 264]), rng,
                  values=values)
        for _ in range(12)
    ]  # fmt: skip
    group = VirtualGroup(library, instances, instances[0].world_size, max(map(units, calls)))
    try:
        fault = group.run(calls, seed, STEPS)
        if fault != "none":
            return fault
        for call in calls:
            assert_call_is_right(call)
        assert_group_is_idle(group)
    except AssertionError as error:
        return str(error)
    finally:
        group.close()
    return ""


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernels_are_caught_and_whole_ones_are_not(name: str, tmp_path: Path) -> None:
    library, whole = mutated(name, tmp_path), name == "none"
    instances = compiled_with(name)
    # Most are caught by the first; a block that begins late enough is one in ten.
    runs = (fault_of_one_run(library, instances, seed) for seed in range(4 if whole else 24))
    fault = next(filter(None, runs), "")
    assert bool(fault) != whole, fault
