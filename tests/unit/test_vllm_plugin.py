"""The plugin inside vLLM's own sources: what arrives in vLLM's config, for 0.22.1 and 0.33.0.

One process per version runs every scenario (``tests/vllm_simulation.py`` says what is real in it).
Skipped where ``tests/vllm_sources.py`` has not fetched the sources.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_script
from tests.vllm_scenarios import MIB, SCENARIOS, homes_in

TESTS = Path(__file__).resolve().parents[1]
SOURCES = TESTS.parent / ".cache" / "vllm-sources"
VERSIONS = ("0.22.1", "0.33.0")


@pytest.fixture(scope="module", params=VERSIONS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name → result of every scenario, under one version's sources."""
    version: str = request.param
    if not (SOURCES / version / ".complete").exists():
        pytest.skip(f"vLLM {version}'s sources are not here: python -m tests.vllm_sources")
    folder = tmp_path_factory.mktemp("homes")
    homes = homes_in(folder)
    asked = []
    for scenario in SCENARIOS.values():
        entry = {**scenario}
        home = homes.get(str(entry.get("profile")), str(folder / "empty"))
        # Both versions are asked about the kernels the profiles hold.
        fixed = {"FUSEWISE_HOME": home, "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm"}
        entry["environ"] = fixed | entry.get("environ", {})
        asked.append(entry)
    path = os.pathsep.join([str(SOURCES / version), str(TESTS.parent / "src")])
    environ = {**os.environ, "PYTHONPATH": path, "VLLM_PLUGINS": "fusewise"}
    script = TESTS / "vllm_simulation.py"
    printed = run_script(script, stdin=json.dumps(asked), environ=environ)
    results = json.loads(printed.splitlines()[-1])
    return {"version": version, **dict(zip(SCENARIOS, results, strict=True))}


@pytest.mark.parametrize(
    ("name", "cap", "tokens"),
    [
        ("seed", 262144, 64),
        ("seed, hidden 4096", 262144, 32),
        ("seed, hidden 7168", 262144, 18),
        ("no multicast", 524288, 128),
        ("nccl symmetric memory", 131072, 32),
        ("nccl symmetric memory, no multicast", 131072, 32),
        ("tp 2", 64 * MIB, None),
        ("tp 2, losing", 4 * MIB, 1024),
        ("full", 4 * MIB, 1024),
        ("rebuilt", 262144, 64),
        ("full without native", 262144, 64),
    ],
)
def test_the_cap_arrives_in_vllms_config(
    outcome: Any, name: str, cap: int, tokens: int | None
) -> None:
    result = outcome[name]
    assert result["cap_bytes"] == cap
    assert result["endpoints"] == ([tokens] if tokens else []) + [8192]
    assert result["fuses"]
    assert len([line for line in result["log"] if line.startswith("INFO")]) == 1


def test_the_log_names_old_new_reason_and_profile(outcome: Any) -> None:
    (line,) = outcome["seed"]["log"]
    for words in ("512K -> 256K", "1.87 µs", "multimem", "packaged profile nvidia-h200-tp8"):
        assert words in line
    assert "stays 512K" in outcome["no multicast"]["log"][0]
    assert "by rule" in outcome["nccl symmetric memory"]["log"][0]


@pytest.mark.parametrize(
    ("name", "measured"), [("as it comes", 262144), ("as it comes, nccl", 131072)]
)
def test_times_of_trtllm_do_not_decide_where_vllm_fuses_with_mnnvl(
    outcome: Any, name: str, measured: int
) -> None:
    """0.33 does where multicast works; neither profile nor rule lowers that cap."""
    result = outcome[name]
    (line,) = result["log"]
    mnnvl = outcome["version"] == "0.33.0"
    assert result["cap_bytes"] == (524288 if mnnvl else measured)
    assert result["plain_flashinfer_mb"] == 0.5  # 0.22 does not ask it, 0.33's cap stays
    assert ("mnnvl, not measured" in line) == mnnvl


def test_a_users_setting_wins_and_is_named(outcome: Any) -> None:
    result = outcome["user's cap"]
    assert result["field_mb"] == 0.375
    assert result["endpoints"] == [96, 8192]
    assert result["mark"] is None
    assert "0.375 MB" in result["log"][0]


def test_plain_flashinfer_reads_the_lowered_table_in_a_worker(outcome: Any) -> None:
    asked = outcome["version"] == "0.33.0"  # where nobody reads it, it stays as it was
    assert outcome["seed"]["plain_flashinfer_mb"] == (0.25 if asked else 0.5)
    assert outcome["no multicast"]["plain_flashinfer_mb"] == 0.5
    assert outcome["user's cap"]["plain_flashinfer_mb"] == 0.5
    assert outcome["off"]["plain_flashinfer_mb"] == 0.5


def test_off_changes_nothing(outcome: Any) -> None:
    result = outcome["off"]
    assert (result["wrappers"], result["log"], result["mark"]) == (0, [], None)
    assert result["endpoints"] == [128, 8192]


def test_loaded_twice_is_loaded_once(outcome: Any) -> None:
    assert outcome["loaded twice"]["wrappers"] == 1
    assert outcome["loaded twice"]["cap_bytes"] == 262144


@pytest.mark.parametrize("name", ["tp 1", "no flashinfer", "no fusion on it"])
def test_silent_where_vllm_does_not_fuse(outcome: Any, name: str) -> None:
    result = outcome[name]
    assert result["log"] == []
    assert (result["field_mb"], result["mark"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown mode", "expected cap, full, off"),
        ("a version before all that were read", "0.19.1"),
        ("changed table", "not the one known"),
        ("moved seam", "no_such_thing"),
        ("probe fails", "could not be probed"),
        ("two nodes", "one node"),
        ("rebuilt after a fault", "could not be probed"),
        ("nonsense", "VLLM_USE_NCCL_SYMM_MEM"),
        ("no size", "FUSEWISE_CAP"),
    ],
)
def test_one_line_and_vllm_as_it_was(outcome: Any, name: str, words: str) -> None:
    """One: whoever builds the config again, in a worker too, does not decide anew."""
    result = outcome[name]
    (line,) = result["log"]
    assert line.startswith("WARNING")
    assert words in line
    assert (result["field_mb"], result["mark"]) == (None, None)
    assert result["fuses"]


@pytest.mark.parametrize("name", ["broken profile", "profile named but missing"])
def test_a_bad_profile_is_named_and_passed_over(outcome: Any, name: str) -> None:
    result = outcome[name]
    assert result["cap_bytes"] == 262144  # the packaged profile, or the rule
    assert [line.split()[0] for line in result["log"]] == ["WARNING", "INFO"]
    assert "profile" in result["log"][0]


def test_a_cap_of_nothing_turns_the_fusion_off(outcome: Any) -> None:
    result = outcome["tp 2, never winning"]
    assert not result["fuses"]
    assert result["endpoints"] == [8192]
    assert "nothing fused" in result["log"][0]


def test_full_mode_marks_the_config_for_the_workers(outcome: Any) -> None:
    """The narrow cap is in force; the wide one waits until all ranks have taken it up."""
    full = outcome["full"]
    assert (full["mark"]["mode"], full["mark"]["cap_mb"]) == ("full", 4)
    assert 8 <= full["mark"]["wide_mb"] < 64  # native wins to 8 MiB, NCCL at 64
    assert full["worker_cap_bytes"] == int(full["mark"]["wide_mb"] * MIB)
    assert full["endpoints"] == [1024, 8192]
    assert full["worker_endpoints"] == [8192]  # every batch lies within the wide one
    without = outcome["full without native"]
    assert without["mark"]["mode"] == "cap"
    assert "native" in without["log"][0]


def test_without_the_pass_others_still_read_the_table(outcome: Any) -> None:
    """-O0, -O1 and an explicit false leave plain FlashInfer and models fused by hand."""
    newer = outcome["version"] == "0.33.0"
    for name, reads in [("-O0", newer), ("-O0, plain FlashInfer on", True)]:
        result = outcome[name]
        assert (result["fuses"], result["field_mb"], result["endpoints"]) == (False, None, [8192])
        assert result["plain_flashinfer_mb"] == (0.25 if reads else 0.5)
        assert len(result["log"]) == (1 if reads else 0)
    assert outcome["-O0, no flashinfer"]["log"] == []


def test_batch_invariance_is_vllms_own_affair(outcome: Any) -> None:
    """From 0.29 on it turns the fusion off; before, it takes away what would be faster."""
    result = outcome["batch invariant"]
    newer = outcome["version"] == "0.33.0"
    assert (result["fuses"], result["cap_bytes"]) == (not newer, 524288)
    assert len(result["log"]) == (0 if newer else 1)


def test_nccls_switch_does_not_take_multicast_from_symmetric_memory(outcome: Any) -> None:
    result = outcome["NCCL without multicast"]
    assert result["cap_bytes"] == 262144
    assert "multimem takes over" in result["log"][-1]


def test_a_newer_release_is_taken_for_the_newest_that_was_read(outcome: Any) -> None:
    result = outcome["a version after all that were read"]
    assert result["cap_bytes"] == 262144
    warning, _ = result["log"]
    assert warning.startswith("WARNING")
    assert "0.99.0 was not read; the tables of 0.33 stand for it" in warning


def test_where_every_rank_decides_nothing_is_set_before_all_agree(outcome: Any) -> None:
    result = outcome["external launcher"]
    assert (result["field_mb"], result["endpoints"]) == (None, [128, 8192])
    assert (result["worker_cap_bytes"], result["worker_endpoints"]) == (262144, [64, 8192])
    assert result["plain_flashinfer_mb"] == (0.25 if outcome["version"] == "0.33.0" else 0.5)


def test_every_outcome_is_marked(outcome: Any) -> None:
    unmarked = [name for name, r in outcome.items() if isinstance(r, dict) and not r["marked"]]
    assert unmarked == ["off", "unknown mode", "a version before all that were read", "moved seam"]


def test_blackwell_keeps_its_cap(outcome: Any) -> None:
    assert outcome["another GPU"]["cap_bytes"] == 1 * MIB


def test_the_mark_is_no_part_of_vllms_hash(outcome: Any) -> None:
    results = [r for r in outcome.values() if isinstance(r, dict)]
    assert all(r["hash_is_the_fields"] and r["table_intact"] for r in results)


def test_importing_the_entry_point_imports_neither_vllm_nor_torch() -> None:
    assert importlib.util.find_spec("fusewise.engines.vllm.plugin") is not None
    code = (
        "import sys; import fusewise.engines.vllm.plugin; "
        "print([m for m in ('torch', 'vllm', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_old_entry_point_says_so_and_loads_the_plugin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fusewise.integrations import vllm as old

    loaded: list[str] = []
    monkeypatch.setattr("fusewise.engines.vllm.plugin.register", lambda: loaded.append("yes"))
    with caplog.at_level("INFO", "vllm.plugins.fusewise"):
        old.register()
    assert loaded == ["yes"]
    assert "fusewise.engines.vllm.plugin" in caplog.text
