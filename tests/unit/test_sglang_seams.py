"""The plugin's seams and the tables' numbers against what was read in SGLang's wheels.

``tests/data/sglang_seams.json`` holds what ``tests/sglang_sources.py`` read. Where the sources are
unpacked here, the record is compared with them first.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from fusewise.engines.seams import Seam, parameters_fault
from fusewise.engines.sglang import seams
from fusewise.engines.sglang.dispatch import SGLangSettings
from fusewise.engines.sglang.tables import TABLES, Ends
from tests import sglang_sources

RECORD: dict[str, Any] = json.loads(sglang_sources.RECORD.read_text("utf-8"))
SEAMS = (seams.REGISTRY_SEAM, *seams.HOOKED_SEAMS, *seams.READ_SEAMS)


def test_every_release_is_recorded() -> None:
    assert list(TABLES) == list(RECORD) == list(sglang_sources.RELEASES)


@pytest.mark.parametrize("version", RECORD)
def test_the_record_is_what_the_wheel_says(version: str) -> None:
    folder = sglang_sources.WHEELS.unpacked(version)
    if folder is None:
        pytest.skip(f"SGLang {version} is not unpacked: python -m tests.sglang_sources --record")
    found = sglang_sources.facts(folder / "sglang", sglang_sources.seam_places())
    assert found == RECORD[version]


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
@pytest.mark.parametrize("version", RECORD)
def test_each_seam_is_where_the_plugin_looks(version: str, seam: Seam) -> None:
    found = RECORD[version]["seams"][seam.name]
    assert found is not None, f"SGLang {version} has moved {seam}"
    if seam.takes is not None:
        assert parameters_fault(seam, found) is None, f"SGLang {version}: {seam}"


@pytest.mark.parametrize("version", RECORD)
def test_the_fused_kernel_is_called_with_what_the_router_needs(version: str) -> None:
    (keywords,) = RECORD[version]["fused_call"]
    assert "*" not in keywords
    assert {
        "input", "pattern", "residual_in", "residual_out", "norm_out", "rms_gamma", "rms_eps",
    } <= set(keywords)  # fmt: skip
    assert not {"output", "quant_out", "scale_out"} & set(keywords)


@pytest.mark.parametrize("version", RECORD)
def test_the_gate_compares_tokens_and_compares_them_last(version: str) -> None:
    gate = RECORD[version]["gate"]
    assert gate[-1] == "batch_size <= FUSE_ALLREDUCE_MAX_BATCH_SIZE"
    assert "not uses_cutedsl_ar_fusion()" in gate
    assert "not is_flashinfer_allreduce_unavailable()" in gate


def ends(record: dict[str, Any]) -> Ends:
    low, high = (int(size) for size in record["mc"])
    return Ends(
        record["one_shot_push_threshold"],
        record["one_shot_pull_threshold"],
        record["two_shot_pull_threshold"],
        (low, high) if high else None,
        record.get("two_shot_push_threshold", 0),  # new in 0.5.23
    )


@pytest.mark.parametrize("version", RECORD)
def test_the_tables_hold_the_wheels_numbers(version: str) -> None:
    tables, record = TABLES[version], RECORD[version]
    plain = record["tables"]
    assert tables.max_tokens == plain["max_tokens"]
    assert tables.legacy_max_bytes == plain["legacy_max_bytes"]
    assert list(tables.legacy_world_sizes) == plain["legacy_world_sizes"]
    for ours, theirs in (
        (tables.symm_mem_max_bytes, plain["symm_mem"]),
        (tables.multimem_world_sizes, plain["multimem"]),
    ):
        assert json.loads(json.dumps(ours)) == theirs
    for sm, gpu in ((90, "sm90"), (100, "sm100"), (103, "sm100"), (107, "sm107")):
        for world_size, custom in tables.custom[sm].items():
            theirs = record["custom"][gpu][str(world_size)]
            assert custom.graph == ends(theirs["graph"]), (sm, world_size)
            assert custom.eager == ends(theirs["eager"]), (sm, world_size)
    most = tables.custom_max_bytes // 2**10
    assert record["switches"]["SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB"] == (
        f"EnvInt({most // 2**10} * 1024)"
    )


@pytest.mark.parametrize("version", RECORD)
def test_switches_options_and_the_plugins_group(version: str) -> None:
    record = RECORD[version]
    switches = record["switches"]
    assert switches["SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"] == "EnvBool(True)"
    assert switches["SGLANG_ENABLE_PCIE_IPC_ALLREDUCE"] == "EnvBool(False)"
    assert all(switches.values())
    assert record["options"] == list(sglang_sources._OPTIONS)
    assert record["tables"]["plugin_group"] == "sglang.srt.plugins"
    for sm, gpu in ((90, "sm90"), (100, "sm100")):
        settings = SGLangSettings(version, sm, 8, True)
        assert settings.fused_backend == record["backend"][gpu]


@pytest.mark.parametrize("version", RECORD)
def test_the_dispatch_asks_in_the_order_of_the_model(version: str) -> None:
    """``SGLangSettings._dispatch``; the first question is the traced branch's only one."""
    asked = RECORD[version]["dispatch"]
    assert asked["all_reduce"] == ["flashinfer", "custom", "nccl_symm", "flashinfer"]
    order = asked["_resolve_outplace_all_reduce_method"]
    assert order == ["custom", "flashinfer_pcie_ipc", "symm_mem"]
