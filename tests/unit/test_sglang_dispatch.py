"""SGLang's dispatch and rule as data: both sides of each boundary, and what the commands answer."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest

from fusewise.engines.cap import decide_cap
from fusewise.engines.sglang.dispatch import SGLangSettings
from fusewise.engines.sglang.engine import settings_on
from fusewise.engines.sglang.tables import known_version, tables_of
from fusewise.errors import InputError, UnavailableError
from fusewise.node import Fingerprint
from fusewise.profiles.store import load

KIB, MIB = 2**10, 2**20


def sglang(
    world_size: int = 8, sm: int = 90, multicast: bool = True, **more: Any
) -> SGLangSettings:
    return SGLangSettings("0.5.23", sm, world_size, multicast, **more)


def node(**changes: Any) -> Fingerprint:
    facts = {"device": "NVIDIA H200", "sm": 90, "world_size": 8, "fabric": "nv18"}
    return Fingerprint(**{"device_type": "cuda", "multicast": True, **facts, **changes})


@pytest.mark.parametrize(
    ("settings", "message_bytes", "path"),
    [
        (sglang(), 128 * KIB, "sglang.one_shot_push"),
        (sglang(), 128 * KIB + 16, "sglang.two_shot_pull"),
        (sglang(), 512 * KIB - 16, "sglang.two_shot_pull"),
        (sglang(), 512 * KIB, "sglang.multimem"),
        (sglang(multicast=False), 512 * KIB, "sglang.two_shot_pull"),
        (sglang(), 16 * MIB, "sglang.multimem"),
        (sglang(), 16 * MIB + 16, "nccl"),
        (sglang(), 64 * KIB + 8, "nccl"),  # no multiple of 16 bytes
        (sglang(2), 16 * MIB, "sglang.one_shot_push"),
        (sglang(2), 16 * MIB + 16, "nccl"),
        (sglang(2, custom_max_bytes=4 * MIB), 4 * MIB, "sglang.one_shot_push"),
        (sglang(2, custom_max_bytes=4 * MIB), 4 * MIB + 16, "nccl"),
        (sglang(4, 100), 640 * KIB, "sglang.one_shot_push"),
        (sglang(4, 100), 8 * MIB, "sglang.two_shot_push"),
        (sglang(4, 100), 8 * MIB + 16, "sglang.two_shot_pull"),
        (sglang(4, 100, custom_max_bytes=MIB), 2 * MIB, "sglang.two_shot_push"),
        (sglang(4, 100, custom_max_bytes=MIB), 2 * MIB + 16, "nccl"),
        (sglang(custom_v2=False), 8 * MIB, "custom"),
        (sglang(custom_v2=False), 8 * MIB + 16, "nccl"),
        (sglang(fully_connected=False), MIB, "nccl"),
        (sglang(2, fully_connected=False), MIB, "custom"),
        (sglang(fully_connected=False, pcie_ipc=True), MIB, "flashinfer_pcie_ipc"),
        (sglang(custom_all_reduce=False), MIB, "nccl"),
        (sglang(custom_all_reduce=False, symm_mem=True), 128 * MIB - 16, "multimem"),
        (sglang(custom_all_reduce=False, symm_mem=True), 128 * MIB, "nccl"),
        (sglang(2, custom_all_reduce=False, symm_mem=True), MIB, "symm_mem.two_shot"),
        (sglang(2, multicast=False, custom_all_reduce=False, symm_mem=True), MIB, "nccl"),
        (sglang(dtype="float16", custom_all_reduce=False, symm_mem=True), MIB, "nccl"),
        (sglang(symm_mem=True), 16 * MIB + 16, "multimem"),
        (sglang(nccl_symm_mem=True), 16 * MIB, "sglang.multimem"),
        (sglang(nccl_symm_mem=True, symm_mem=True), 16 * MIB + 16, "nccl_symm"),
    ],
)
def test_a_displaced_message_goes_where_sglang_sends_it(
    settings: SGLangSettings, message_bytes: int, path: str
) -> None:
    assert settings.displaced_choice(message_bytes) == f"{path} + rms_norm"


def test_two_shot_push_is_new_in_0_5_23() -> None:
    before = SGLangSettings("0.5.22", 100, 4, True)
    assert before.displaced_choice(MIB) == "sglang.one_shot_push + rms_norm"
    assert before.displaced_choice(4 * MIB) == "sglang.two_shot_pull + rms_norm"
    assert sglang(4, 100).displaced_choice(4 * MIB) == "sglang.two_shot_push + rms_norm"


def test_plain_flashinfer_comes_first_as_far_as_the_workspace_reaches() -> None:
    most = 2048 * 4096 * 2
    assert sglang().unfused_choice(most, 4096) == "flashinfer + rms_norm"
    assert sglang().unfused_choice(most + 8192, 4096) == "nccl + rms_norm"
    assert sglang(fuses=False).unfused_choice(MIB, 4096) == "sglang.multimem + rms_norm"
    # NCCL's symmetric memory is asked before it, but only where the custom kernels decline.
    on = sglang(nccl_symm_mem=True)
    assert on.unfused_choice(MIB, 7168) == "flashinfer + rms_norm"
    assert on.unfused_choice(17 * MIB, 7168) == "nccl_symm + rms_norm"


@pytest.mark.parametrize(
    ("settings", "message_bytes", "path"),
    [
        (sglang(8), 42 * MIB // 16, "flashinfer.one_shot"),
        (sglang(8), 42 * MIB // 16 + 16, "flashinfer.two_shot"),
        (sglang(4), 8 * MIB, "flashinfer.one_shot"),
        (sglang(4), 8 * MIB + 16, "flashinfer.two_shot"),
        (sglang(2), 64 * MIB, "flashinfer.one_shot"),
        (sglang(8, 100), MIB, "flashinfer.mnnvl"),
        (sglang(8, 100, flashinfer_backend="trtllm"), MIB, "flashinfer.one_shot"),
        (sglang(8, 90, flashinfer_backend="mnnvl"), MIB, "flashinfer.mnnvl"),
    ],
)
def test_the_fused_kernel_is_flashinfers_own_choice(
    settings: SGLangSettings, message_bytes: int, path: str
) -> None:
    assert settings.fused_choice(message_bytes) == path


def test_the_threshold_is_tokens_whatever_they_weigh() -> None:
    assert [sglang().cap_bytes(h) for h in (2048, 7168)] == [8 * MIB, 28 * MIB]
    assert sglang(8, 103).cap_bytes(7168) == 28 * MIB
    for none in (sglang(8, 89), sglang(8, 120), sglang(1), sglang(fuses=False)):
        assert none.threshold is None
        assert none.rule().cap_bytes is None


@pytest.mark.parametrize(
    ("settings", "hidden_size", "cap", "lowered", "why"),
    [
        (sglang(), 7168, 512 * KIB, True, "multimem kernel takes over at 512K"),
        (sglang(multicast=False), 7168, 28 * MIB, False, "no faster"),
        (sglang(4), 7168, 28 * MIB, False, "no faster"),  # in graphs it never runs there
        (sglang(4, nccl_symm_mem=True), 7168, 16 * MIB, True, "NCCL symmetric memory"),
        (sglang(4, nccl_symm_mem=True), 4096, 16 * MIB, False, "not below the cap"),
        (sglang(4, symm_mem=True, custom_v2=False), 4096, 8 * MIB, True, "multimem takes over"),
        (sglang(custom_all_reduce=False, symm_mem=True), 7168, 28 * MIB, False, "no faster"),
        (sglang(8, 100), 7168, 28 * MIB, False, "mnnvl, not measured"),
        (sglang(8, 100, flashinfer_backend="trtllm"), 7168, 8 * MIB, True, "takes over at 8M"),
    ],
)
def test_the_rule(
    settings: SGLangSettings, hidden_size: int, cap: int, lowered: bool, why: str
) -> None:
    rule = settings.rule(hidden_size)
    assert (rule.cap_bytes, rule.lowered) == (cap, lowered)
    assert why in rule.why


LAST_WIN = 1117 * 4096  # of the packaged profile of two H200s, hidden 2048


def test_measured_losses_lower_the_cap_and_gaps_decide_nothing() -> None:
    tp2, tp8 = load("nvidia-h200-tp2"), load("nvidia-h200-tp8")
    legacy = sglang(2, multicast=False, custom_v2=False)
    for hidden_size, cap in ((2048, LAST_WIN), (4096, 16 * MIB)):
        decided = decide_cap(tp2, legacy, hidden_size=hidden_size)
        assert (decided.cap_bytes, decided.origin) == (cap, "published")
    # SGLang's own kernels were not measured: neither NCCL's win above them nor its loss speaks.
    for hidden_size in (2048, 4096, 7168):
        decided = decide_cap(tp2, sglang(2, multicast=False), hidden_size=hidden_size)
        assert decided.cap_bytes == 2048 * hidden_size * 2
        assert decided.origin == "engine default"
    assert decide_cap(tp8, sglang(), hidden_size=7168).origin == "rule"
    multimem = sglang(custom_all_reduce=False, symm_mem=True)
    decided = decide_cap(tp8, multimem, hidden_size=7168)
    assert (decided.cap_bytes, decided.origin) == (256 * KIB, "published")


@pytest.mark.parametrize(
    ("unmeasured", "cap", "origin"),
    [
        (range(LAST_WIN + 1), LAST_WIN, "published"),  # the loss behind it stands on its own
        (range(LAST_WIN + 1, 9 * MIB), 8 * MIB, "engine default"),  # below its threshold
        ([1 * MIB], LAST_WIN, "published"),
    ],
)
def test_a_loss_needs_no_neighbours_and_a_win_has_no_gaps(
    unmeasured: Container[int], cap: int, origin: str
) -> None:
    profile = load("nvidia-h200-tp2")
    kept = tuple(
        sample
        for sample in profile.samples
        if sample.path != "custom + rms_norm"
        or sample.num_tokens * sample.hidden_size * 2 not in unmeasured
    )
    legacy = sglang(2, multicast=False, custom_v2=False)
    decided = decide_cap(profile.model_copy(update={"samples": kept}), legacy, hidden_size=2048)
    assert (decided.cap_bytes, decided.origin) == (cap, origin)


def test_a_measured_win_never_reaches_beyond_its_own_threshold() -> None:
    nccl = sglang(2, multicast=False, custom_all_reduce=False)
    decided = decide_cap(load("nvidia-h200-tp2"), nccl, hidden_size=7168)
    assert (decided.cap_bytes, decided.origin) == (2048 * 7168 * 2, "published")


def test_switches_are_read_as_sglang_reads_them() -> None:
    environ = {
        "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2": "No",
        "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE": "y",
        "SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB": "1024",
    }
    found = settings_on("0.5.23", node(), "bfloat16", environ, {"symm_mem": True})
    assert (found.custom_v2, found.pcie_ipc, found.symm_mem) == (False, True, True)
    assert found.custom_max_bytes == MIB
    assert not settings_on("0.5.23", node(fabric="pcie"), "bfloat16", {}, {}).fully_connected


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        ({"SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2": "on"}, {}, "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"),
        ({"SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB": "16M"}, {}, "V2_MAX_SIZE_KB.*whole number"),
        ({}, {"flashinfer_backend": "cutedsl"}, "fusion-backend.*'cutedsl'"),
    ],
)
def test_nonsense_in_a_switch_is_named(
    environ: dict[str, str], flags: dict[str, str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        settings_on("0.5.23", node(), "bfloat16", environ, flags)


@pytest.mark.parametrize("changes", [{"nodes": 2, "fabric": "net"}, {"world_size": 6}])
def test_a_node_it_does_not_fuse_on_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnavailableError, match="one node"):
        settings_on("0.5.23", node(**changes), "bfloat16", {}, {})


def test_forced_kernel_sizes_are_beyond_the_tables() -> None:
    name = "SGLANG_FORCE_CUSTOM_ALL_REDUCE_V2_PULL_SIZE_KB"
    with pytest.raises(UnavailableError, match=name):
        settings_on("0.5.23", node(), "bfloat16", {name: "65536"}, {})


def test_versions() -> None:
    assert tables_of("0.5.23.post1").read_in == "0.5.23"
    assert known_version("0.5.23") == ("0.5.23", None)
    known, warning = known_version("0.6.0")
    assert known == "0.5.23"
    assert "0.6.0 was not read" in str(warning)
    assert known_version("0.5.22") == ("0.5.22", None)
    for unknown in ("0.5.21", "main", ""):
        with pytest.raises(InputError, match="unknown SGLang version"):
            known_version(unknown)
