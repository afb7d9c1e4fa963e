"""The plugin's seams and the tables' numbers, release by release, 0.20 to 0.33.

``tests/data/vllm_seams.json`` holds what ``tests/vllm_sources.py`` read in each wheel. Released
wheels do not change, so the record is as good as they are; where a wheel's sources are unpacked
here, the record is compared with them first.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fusewise.engines.vllm import seams as vllm_seams
from fusewise.engines.vllm.tables import TABLES, Tables, tables_of
from tests import vllm_sources
from tests.wheel_sources import Wheels, differences, write

TESTS = Path(__file__).resolve().parents[1]
RECORD: dict[str, Any] = json.loads((TESTS / "data" / "vllm_seams.json").read_text("utf-8"))
SEAMS = (
    *vllm_seams.CONFIG_SEAMS,
    *vllm_seams.WORKER_SEAMS,
    vllm_seams.TABLE_SEAM,
    vllm_seams.FUSED_SEAM,
)
MIB = 2**20


def test_every_release_is_recorded() -> None:
    assert sorted(tables.read_in for tables in TABLES.values()) == sorted(RECORD)


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
@pytest.mark.parametrize("version", RECORD)
def test_each_seam_is_where_the_plugin_looks(version: str, seam: vllm_seams.Seam) -> None:
    found = RECORD[version]["seams"][seam.name]
    assert found is not None, f"vLLM {version} has moved {seam}"
    if seam.takes is not None:
        assert vllm_seams.parameters_fault(seam, found) is None, f"vLLM {version}: {seam}"


@pytest.mark.parametrize("version", RECORD)
def test_the_fused_kernel_is_called_by_keyword_at_one_place(version: str) -> None:
    (keywords,) = RECORD[version]["fused_call"]
    assert "*" not in keywords
    assert {
        "input", "pattern", "residual_in", "residual_out", "norm_out", "rms_gamma", "rms_eps",
        "output", "quant_out", "scale_out",
    } <= set(keywords)  # fmt: skip


def _by_sm(table: dict[str, dict[str, float]], unit: int) -> dict[int, dict[int, int]]:
    return {
        int(sm.replace(".", "")): {int(size): int(value * unit) for size, value in row.items()}
        for sm, row in table.items()
    }


@pytest.mark.parametrize("version", RECORD)
def test_our_tables_are_vllms(version: str) -> None:
    theirs, ours = RECORD[version]["tables"], tables_of(version)
    assert _by_sm(theirs["fusion"], MIB) == ours.fusion_max_bytes
    assert _by_sm(theirs["one_shot"], MIB) == ours.one_shot_max_bytes
    assert _by_sm(theirs["custom"], 1) == ours.custom_max_bytes
    assert _by_sm(theirs["symm_mem"], 1) == ours.symm_mem_max_bytes
    multimem = {int(k.replace(".", "")): tuple(v) for k, v in theirs["multimem"].items()}
    assert multimem == ours.multimem_world_sizes
    assert theirs["flashinfer_default"] is ours.flashinfer_default
    for name in ("prefers_mnnvl", "invariant_is_plain", "hand_fused", "has_pcie_ipc"):
        assert RECORD[version][name] is getattr(ours, name), name
    assert RECORD[version]["dispatch"] == list(ours.dispatch)[:-1]
    _same_nccl_and_mnnvl(theirs, ours)


def _same_nccl_and_mnnvl(theirs: dict[str, Any], ours: Tables) -> None:
    config = theirs["nccl_symm"]
    ranges = {int(k): tuple(v) for k, v in config["custom_ar_preferred_ranges"].items()}
    assert ranges == ours.nccl_symm_ranges
    assert config["always_use_above_world_size"] == ours.nccl_symm_above_world_size
    assert config["min_world_size"] <= min(ranges)  # so the ranges alone decide
    one_node = {}
    for key, size_mb in (theirs["mnnvl"] or {}).items():
        sm, world_size, nodes = map(int, key.strip("()").split(","))
        if nodes == 1:
            one_node[sm, world_size] = int(size_mb * MIB)
    assert one_node == (ours.mnnvl_max_bytes or {})


@pytest.mark.parametrize("version", RECORD)
def test_the_record_is_what_the_wheel_says(version: str) -> None:
    folder = vllm_sources.WHEELS.unpacked(version)
    if folder is None:
        pytest.skip(f"vLLM {version} is not unpacked: python -m tests.vllm_sources --all")
    assert vllm_sources.facts(folder / "vllm", vllm_sources.seam_places()) == RECORD[version]


def test_differences_between_two_releases_are_named_one_by_one() -> None:
    """What ``--add`` prints for a release nobody has put into the tables yet."""
    old = {"tables": {"fusion": {"90": {"8": 0.5}}}, "dispatch": ["custom"], "gone": 1}
    new = {"tables": {"fusion": {"90": {"8": 1, "16": 2}}}, "dispatch": ["custom"], "came": 2}
    assert differences(old, new) == [
        "tables.fusion.90.8: 0.5 -> 1", "tables.fusion.90.16: None -> 2",
        "gone: 1 -> None", "came: None -> 2",
    ]  # fmt: skip
    assert differences(RECORD["0.33.0"], RECORD["0.33.0"]) == []


def test_a_new_release_is_one_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.33 under another name: recorded, and compared with the newest that was."""
    folder = vllm_sources.WHEELS.unpacked("0.33.0")
    if folder is None:
        pytest.skip("vLLM 0.33.0 is not unpacked: python -m tests.vllm_sources")
    (tmp_path / "0.34.0").symlink_to(folder)
    monkeypatch.setattr(vllm_sources, "WHEELS", Wheels("vllm", tmp_path))
    monkeypatch.setattr(vllm_sources, "RECORD", tmp_path / "record.json")
    write(tmp_path / "record.json", {"0.32.0": RECORD["0.32.0"]})
    assert vllm_sources.add("0.34.0") == 0
    said = capsys.readouterr().out
    assert "vLLM 0.34.0 against 0.32.0:" in said
    changed = differences(RECORD["0.32.0"], RECORD["0.33.0"])
    assert changed
    assert all(line in said for line in changed)
    record = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert record == {"0.32.0": RECORD["0.32.0"], "0.34.0": RECORD["0.33.0"]}


@pytest.fixture
def somewhere(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("somewhere")

    class Owner:
        def method(self, first: int, second: int) -> int:
            return first + second

    module.Owner = Owner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somewhere", module)
    return module


def test_missing_names_the_seam_and_what_came(somewhere: types.ModuleType) -> None:
    fine = vllm_seams.Seam("a", "somewhere", "Owner.method", ("self", "second"))
    assert vllm_seams.missing([fine]) == []
    gone = vllm_seams.Seam("b", "somewhere", "Owner.other")
    moved = vllm_seams.Seam("c", "nowhere_at_all", "Owner")
    other = vllm_seams.Seam("d", "somewhere", "Owner.method", ("self", "third"))
    swapped = vllm_seams.Seam("e", "somewhere", "Owner.method", ("second", "first"))
    faults = vllm_seams.missing([fine, gone, moved, other, swapped])
    assert [fault.split(" (")[0] for fault in faults] == [
        "somewhere:Owner.other", "nowhere_at_all:Owner",
        "somewhere:Owner.method", "somewhere:Owner.method",
    ]  # fmt: skip
    assert "takes (self, first, second)" in faults[2]


def test_wrap_wraps_once(somewhere: types.ModuleType) -> None:
    owner = somewhere.Owner

    def doubled(original: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * int(original(*args, **kwargs))

    vllm_seams.wrap(owner, "method", doubled)
    vllm_seams.wrap(owner, "method", doubled)
    assert owner().method(1, second=2) == 6
    assert owner.method.__name__ == "method"
