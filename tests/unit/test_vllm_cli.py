"""``fusewise vllm check`` and ``patch``, the settings they read, and the patch they print."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fusewise.commands.vllm import app
from fusewise.engines import plugin as vllm_node
from fusewise.engines.plugin import probe_apart
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.engines.vllm.engine import settings_on
from fusewise.engines.vllm.patch import TABLE_FILE, table_patch
from fusewise.engines.vllm.seams import CONFIG_SEAMS, WORKER_SEAMS
from fusewise.errors import InputError, UnavailableError
from fusewise.node import Fingerprint

SEED = ["--version", "0.33", "--profile", "nvidia-h200-tp8"]
NODE = Fingerprint(
    device_type="cuda", device="NVIDIA H200", sm=90, world_size=8, fabric="nv18", multicast=True
)
SETTINGS = VllmSettings(version="0.33", sm=90, world_size=8, multicast=True)
SOURCE = """\
# Max size of the input tensor per world size per device capability
# to use flashinfer fused allreduce
FI_ALLREDUCE_FUSION_MAX_SIZE_MB: dict[int, dict[int, float]] = {
    90: {
        2: 64,  # 64MB
        4: 2,  # 2MB
        8: 0.5,  # 0.5MB
    },
    100: {
        2: 64,  # 64MB
        8: 1,  # 1MB
    },
}

_FI_ALLREDUCE_ONE_SHOT_MAX_SIZES_MB: dict[int, dict[int, float]] = {
    90: {
        8: 0.5,  # 0.5MB
    },
}
"""


def run(*arguments: str, **environ: str) -> Result:
    fixed = {"FUSEWISE_PROFILE": "", "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm"}
    return CliRunner().invoke(app, arguments, env=fixed | environ)


def facts(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (row,) = document["summary"]["rows"]
    return {**row, "bands": document["losing_bands"]["rows"]}


def test_check_says_what_it_would_do_and_what_the_setting_costs() -> None:
    found = facts(run("check", *SEED, "--format", "json"))
    assert (found["engine_cap_bytes"], found["cap_bytes"]) == (524288, 262144)
    assert (found["level"], found["origin"]) == ("flag", "published")
    assert [band["worst_cost_us"] for band in found["bands"]] == [4.3]
    assert found["unfused_today"] == "flashinfer + rms_norm"
    assert found["unfused_capped"] == "multimem + rms_norm"
    assert '"fi_allreduce_fusion_max_size_mb": 0.25' in found["flag"]


def test_check_reads_vllms_own_switches() -> None:
    asked = ("check", *SEED, "--format", "json")

    def cap(**environ: str) -> int:
        return int(facts(run(*asked, **environ))["cap_bytes"])

    assert cap(VLLM_USE_NCCL_SYMM_MEM="1") == 131072
    assert cap(VLLM_ALLREDUCE_USE_SYMM_MEM="0") == 524288
    assert cap(FUSEWISE_VLLM="off") == 524288
    explicit = facts(run(*asked, FUSEWISE_CAP="384K"))
    assert (explicit["cap_bytes"], explicit["level"], explicit["origin"]) == (
        393216, "environment", "explicit",
    )  # fmt: skip


def _write_seams(folder: Path, but_for: str) -> None:
    """A vllm of nothing but the places the plugin touches."""
    owners: dict[tuple[str, str], list[str]] = {}
    for seam in (*CONFIG_SEAMS, *WORKER_SEAMS):
        owner, _, name = seam.name.rpartition(".")
        takes = None if seam.takes is None else ", ".join(seam.takes)
        line = f"{name} = 1" if takes is None else f"def {name}({takes}): ..."
        if seam.name != but_for:
            owners.setdefault((seam.module, owner), []).append(line)
    for (module, owner), lines in owners.items():
        file = folder / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as text:
            text.write(f"class {owner or 'Nobody'}:\n    " + "\n    ".join(lines) + "\n")
    (folder / "vllm" / "__init__.py").touch()


@pytest.mark.parametrize("moved", [False, True])
def test_check_looks_for_the_seams_of_a_release_nobody_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moved: bool
) -> None:
    """The newest tables stand for it, said so; where a seam has moved the plugin does nothing."""
    _write_seams(tmp_path, "CudaCommunicator.all_reduce" if moved else "")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.34.1")
    result = run("check", *SEED[2:], "--format", "json")
    found = facts(result)
    assert "vLLM 0.34.1 was not read; the tables of 0.33 stand for it" in result.stderr
    assert found["cap_bytes"] == 262144
    words = "the plugin does nothing: this vLLM has moved"
    assert (words in result.stderr) == moved
    assert ("CudaCommunicator.all_reduce" in result.stderr) == moved


def test_check_lists_token_caps() -> None:
    result = run("check", *SEED, "--format", "json", "--hidden", "2048,4096,7168")
    rows = json.loads(result.stdout)["hidden_sizes"]["rows"]
    assert [row["max_tokens"] for row in rows] == [64, 32, 18]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["check", "--profile", "nvidia-h200-tp8"], 2, "not installed"),
        (["check", "--profile", "nvidia-h200-tp8", "--version", "9"], 2, "unknown vLLM version"),
        (["check", "--profile", "no-such", "--version", "0.33"], 5, "no-such"),
        (["patch", *SEED], 2, "not installed"),
        (["patch", *SEED, "--source", "/nowhere"], 2, "--source"),
    ],
)
def test_errors_are_one_line_with_a_code(arguments: list[str], code: int, words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_patch_carries_the_evidence_and_applies(tmp_path: Path) -> None:
    file = tmp_path / TABLE_FILE
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE, encoding="utf-8")
    result = run("patch", *SEED, "--source", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "| 2048 | 96 | 384K | flashinfer.one_shot | 15.0 |" in result.stdout
    assert "44079" in result.stdout
    subprocess.run(
        ["git", "apply", "-"], input=result.stdout, text=True, cwd=tmp_path, check=True, timeout=30
    )
    changed = SOURCE.replace("8: 0.5,  # 0.5MB", "8: 0.25,  # 0.25MB", 1)
    assert file.read_text(encoding="utf-8") == changed


def test_patch_needs_a_cap_from_a_profile(tmp_path: Path) -> None:
    result = run("patch", *SEED, "--source", str(tmp_path), VLLM_USE_NCCL_SYMM_MEM="1")
    assert result.exit_code == 2
    assert "no measured cap" in result.stderr


@pytest.mark.parametrize(
    ("settings", "cap", "words"),
    [
        (SETTINGS, 524288, "already"),
        (replace(SETTINGS, sm=103), 262144, "no entry"),
        (replace(SETTINGS, world_size=4, sm=100), 262144, "no entry"),
    ],
)
def test_a_patch_that_changes_nothing_is_refused(
    settings: VllmSettings, cap: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        table_patch(SOURCE, settings, cap)


def test_an_odd_cap_keeps_its_bytes() -> None:
    assert "+        8: 0.3814697265625,  # 0.3814697265625MB" in table_patch(
        SOURCE, SETTINGS, 400_000
    )


def test_settings_have_vllms_defaults() -> None:
    assert settings_on("0.33", NODE, "bfloat16", {}, {}) == SETTINGS


@pytest.mark.parametrize(
    ("environ", "changes"),
    [
        ({"VLLM_USE_NCCL_SYMM_MEM": "1"}, {"nccl_symm_mem": True}),
        ({"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}, {"symm_mem": False}),
        ({"VLLM_ALLREDUCE_USE_FLASHINFER": "0"}, {"flashinfer_all_reduce": False}),
        ({"VLLM_ALLREDUCE_USE_FLASHINFER": "1"}, {"flashinfer_all_reduce": True}),
        ({"VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm"}, {"flashinfer_backend": "trtllm"}),
        (
            {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_NCCL_SYMM_MEM": "1"},
            {"symm_mem": False, "batch_invariant": True},
        ),
        ({"VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC": "1"}, {"pcie_ipc": True}),
    ],
)
def test_settings_follow_the_switches(environ: dict[str, str], changes: dict[str, Any]) -> None:
    assert settings_on("0.33", NODE, "bfloat16", environ, {}) == replace(SETTINGS, **changes)


def test_settings_follow_the_node() -> None:
    bridged = NODE.model_copy(update={"fabric": "pcie", "multicast": False})
    found = settings_on("0.33", bridged, "float16", {}, {"custom_all_reduce": False})
    assert (found.fully_connected, found.multicast, found.dtype) == (False, False, "float16")
    assert found.custom_all_reduce is False


@pytest.mark.parametrize(
    "environ",
    [{"VLLM_USE_NCCL_SYMM_MEM": "yes"}, {"VLLM_FLASHINFER_ALLREDUCE_BACKEND": "nvls"}],
)
def test_settings_refuse_what_vllm_refuses(environ: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(environ))):
        settings_on("0.33", NODE, "bfloat16", environ, {})


@pytest.mark.parametrize("changes", [{"sm": None, "device_type": "cpu"}, {"nodes": 2}])
def test_settings_need_the_gpus_of_one_node(changes: dict[str, Any]) -> None:
    with pytest.raises(UnavailableError, match="one node"):
        settings_on("0.33", NODE.model_copy(update=changes), "bfloat16", {}, {})


def test_more_ranks_than_gpus_span_nodes() -> None:
    """The probe's own code, with two GPUs."""
    code = vllm_node._PROBE.replace("ranks, gpus", "gpu_count = lambda: 2; ranks, gpus")
    for ranks, nodes in [(2, 1), (3, 2), (4, 2), (8, 4)]:
        run_probe = [sys.executable, "-c", code, str(ranks)]
        done = subprocess.run(run_probe, capture_output=True, text=True, check=True, timeout=60)
        assert json.loads(done.stdout.splitlines()[0])["nodes"] == nodes


def test_the_probe_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_node._probed.cache_clear()
    assert probe_apart(2).world_size == 2
    assert vllm_node.torch_multicast_apart(2) is False
    vllm_node._probed.cache_clear()
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(UnavailableError, match="could not be probed"):
        probe_apart(2)
    vllm_node._probed.cache_clear()


def test_the_documents_example_is_what_check_prints() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"
    blocks = page.read_text(encoding="utf-8").split("```text\n")[1:]
    log, example = (block.split("```")[0].strip().splitlines() for block in blocks)
    printed = run("check", "--version", "0.22", *SEED[2:]).stdout.splitlines()
    assert [line for line in example if line not in printed] == []
    assert log[0].endswith("packaged profile nvidia-h200-tp8")
