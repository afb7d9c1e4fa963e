"""vLLM's tables, its dispatch, and the rule of issue 44079, on both sides of every boundary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fusewise.engines.vllm.dispatch import VllmSettings, field_mb
from fusewise.engines.vllm.tables import known_version, tables_of
from fusewise.errors import InputError
from fusewise.shape import parse_size

KIB, MIB = 2**10, 2**20


def settings(**changes: Any) -> VllmSettings:
    """The seed's node, asked about trtllm: what vLLM fuses with by itself up to 0.24."""
    seed = VllmSettings("0.33", 90, 8, multicast=True, flashinfer_backend="trtllm")
    return replace(seed, **changes)


@pytest.mark.parametrize(
    ("sm", "world_size", "version", "cap"),
    [
        (90, 2, "0.22", 64 * MIB),
        (90, 4, "0.22", 2 * MIB),
        (90, 8, "0.22", 512 * KIB),
        (90, 8, "0.33", 512 * KIB),
        (100, 8, "0.33", 1 * MIB),
        (103, 8, "0.22", 2 * MIB),
        (103, 8, "0.28", 2 * MIB),
        (103, 8, "0.29", 4 * MIB),
        (100, 16, "0.24", None),
        (100, 16, "0.25", 64 * MIB),
        (107, 8, "0.26", None),
        (107, 8, "0.27", 2 * MIB),
        (90, 6, "0.33", None),
        (80, 8, "0.33", None),
    ],
)
def test_engine_cap(sm: int, world_size: int, version: str, cap: int | None) -> None:
    assert settings(sm=sm, world_size=world_size, version=version).cap_bytes() == cap


@pytest.mark.parametrize(
    ("sm", "world_size", "limit"), [(90, 2, 32 * MIB), (90, 8, 512 * KIB), (100, 4, 4 * MIB)]
)
def test_one_shot_up_to_and_including_its_limit(sm: int, world_size: int, limit: int) -> None:
    node = settings(sm=sm, world_size=world_size)
    assert node.fused_choice(limit) == "flashinfer.one_shot"
    assert node.fused_choice(limit + 16) == "flashinfer.two_shot"


def test_one_shot_everywhere_where_no_limit_is_listed() -> None:
    assert settings(sm=100, world_size=16).fused_choice(2**30) == "flashinfer.one_shot"


@pytest.mark.parametrize(
    ("changes", "size", "path"),
    [
        ({}, 262128, "custom"),  # strictly below the table's 256 KiB
        ({}, 262144, "multimem"),
        ({}, 262120, "multimem"),  # not a multiple of 16 bytes
        ({}, 64 * MIB, "multimem"),
        ({}, 64 * MIB + 16, "nccl"),
        ({"multicast": False}, 262144, "custom"),  # no symmetric memory: 8 MiB bounds custom
        ({"multicast": False}, 8 * MIB - 16, "custom"),
        ({"multicast": False}, 8 * MIB, "nccl"),
        ({"symm_mem": False}, 262144, "custom"),
        ({"dtype": "float16"}, 262144, "nccl"),  # symmetric memory takes bf16 only
        ({"world_size": 2}, 8 * MIB - 16, "custom"),
        ({"world_size": 2}, 8 * MIB, "symm_mem.two_shot"),
        ({"world_size": 4}, 8 * MIB, "multimem"),
        ({"world_size": 4, "sm": 100}, 2 * MIB - 16, "custom"),
        ({"world_size": 4, "sm": 100}, 2 * MIB, "symm_mem.two_shot"),
        ({"custom_all_reduce": False}, 4096, "multimem"),
        ({"fully_connected": False}, 4096, "multimem"),
        ({"fully_connected": False, "world_size": 2}, 4096, "custom"),
        ({"sm": 80}, 8 * MIB - 16, "custom"),
        ({"sm": 80}, 8 * MIB, "nccl"),
        ({"nccl_symm_mem": True}, 16384, "nccl_symm"),
        ({"nccl_symm_mem": True}, 16400, "custom"),
        ({"nccl_symm_mem": True}, 131056, "custom"),
        ({"nccl_symm_mem": True}, 131072, "nccl_symm"),
        ({"nccl_symm_mem": True, "world_size": 4}, 524272, "custom"),
        ({"nccl_symm_mem": True, "world_size": 4}, 524288, "nccl_symm"),
        ({"nccl_symm_mem": True, "world_size": 2}, 4096, "custom"),
        ({"nccl_symm_mem": True, "world_size": 6}, 4096, "custom"),
        ({"nccl_symm_mem": True, "world_size": 16, "sm": 100}, 32768, "nccl_symm"),
    ],
)
@pytest.mark.parametrize("version", ["0.22", "0.33"])
def test_all_reduce_below_a_lowered_cap(
    changes: dict[str, Any], size: int, path: str, version: str
) -> None:
    assert settings(version=version, **changes).displaced_choice(size) == f"{path} + rms_norm"


@pytest.mark.parametrize(
    ("version", "size", "path"),
    [
        ("0.22", 262144, "multimem"),
        ("0.28", 262144, "multimem"),
        ("0.29", 262144, "flashinfer"),  # on by default, and asked before all others
        ("0.33", 524288, "flashinfer"),
        ("0.33", 524304, "multimem"),
    ],
)
def test_plain_flashinfer_up_to_the_fusion_table(version: str, size: int, path: str) -> None:
    assert settings(version=version).unfused_choice(size) == f"{path} + rms_norm"


def test_flashinfer_before_or_behind_nccl_symmetric_memory() -> None:
    both = {"nccl_symm_mem": True, "flashinfer_all_reduce": True}
    old, new = settings(version="0.28", **both), settings(version="0.29", **both)
    assert old.unfused_choice(8192) == "nccl_symm + rms_norm"
    assert new.unfused_choice(8192) == "flashinfer + rms_norm"
    assert settings(flashinfer_all_reduce=False).flashinfer_active is False


def test_plain_mnnvl_has_a_size_of_its_own_on_blackwell() -> None:
    blackwell = settings(sm=100, flashinfer_backend="auto")
    assert blackwell.displaced_choice(128 * MIB) == "flashinfer + rms_norm"
    assert blackwell.displaced_choice(128 * MIB + 16) == "nccl + rms_norm"
    without = replace(blackwell, multicast=False)
    assert without.displaced_choice(4 * MIB) == "custom + rms_norm"


def test_fused_backend_follows_version_multicast_and_choice() -> None:
    auto = settings(flashinfer_backend="auto")
    assert replace(auto, version="0.24").fused_backend == "trtllm"
    assert replace(auto, version="0.25").fused_backend == "mnnvl"
    assert replace(auto, multicast=False).fused_backend == "trtllm"
    assert settings().fused_backend == "trtllm"
    assert auto.fused_choice(4096) == auto.fused_choice(2**30) == "flashinfer.mnnvl"


@pytest.mark.parametrize(
    "changes", [{}, {"nccl_symm_mem": True}, {"sm": 100, "nccl_symm_mem": True}]
)
def test_the_rule_says_nothing_about_mnnvl(changes: dict[str, Any]) -> None:
    auto = settings(flashinfer_backend="auto", **changes)
    assert auto.rule() == replace(auto.rule(), cap_bytes=auto.cap_bytes(), lowered=False)
    assert "mnnvl" in auto.rule().why
    assert settings(nccl_symm_mem=True).rule().lowered


def test_the_rule_names_only_what_would_run() -> None:
    """NCCL's symmetric memory is switched on, and another all-reduce is asked before it."""
    pcie = settings(nccl_symm_mem=True, pcie_ipc=True, flashinfer_all_reduce=True)
    assert pcie.rule().cap_bytes == 131072  # NCCL's is asked first
    without = settings(pcie_ipc=True)
    assert without.displaced_choice(262144) == "flashinfer_pcie_ipc + rms_norm"
    assert not without.rule().lowered
    assert settings(pcie_ipc=True, version="0.29").rule().lowered  # not there yet


def test_a_tuned_plain_flashinfer_is_never_switched_off() -> None:
    """vLLM keeps a size of its own for it: neither the rule nor the advice may take it away."""
    tuned = settings(sm=100, nccl_symm_mem=True, flashinfer_backend="mnnvl")
    assert tuned.displaced_choice(131072) == "flashinfer + rms_norm"
    assert not tuned.rule().lowered
    assert tuned.environment(131072) is None
    assert settings(sm=100).environment(131072) == "VLLM_ALLREDUCE_USE_FLASHINFER=0"


def test_batch_invariance_as_vllm_reads_it() -> None:
    """From 0.29 on it turns fusion and plain FlashInfer off; before it left both."""
    new, old = (settings(version=v, batch_invariant=True) for v in ("0.29", "0.28"))
    assert (new.cap_bytes(), new.flashinfer_active) == (None, False)
    assert old.cap_bytes() == 524288
    assert not new.rule().lowered


def test_custom_limit_and_symmetric_memory_gates() -> None:
    assert settings().custom_limit == 256 * KIB
    assert settings(dtype="float16").custom_limit == 256 * KIB  # its table ignores the dtype
    assert settings(world_size=3).custom_limit == 0
    assert settings().symm_mem_active
    assert not settings(world_size=3).symm_mem_active


@pytest.mark.parametrize(
    ("changes", "cap", "lowered"),
    [
        ({}, 262144, True),
        ({"version": "0.22"}, 262144, True),
        ({"multicast": False}, 524288, False),
        ({"symm_mem": False}, 524288, False),
        ({"dtype": "float16"}, 524288, False),
        ({"nccl_symm_mem": True}, 131072, True),
        ({"nccl_symm_mem": True, "multicast": False}, 131072, True),
        ({"nccl_symm_mem": True, "world_size": 4}, 524288, True),
        ({"world_size": 4}, 2 * MIB, False),  # multimem starts at 8 MiB there, above the cap
        ({"world_size": 2}, 64 * MIB, False),  # no multimem at two ranks
        ({"sm": 100}, 1 * MIB, False),  # takes over exactly at the cap
        ({"sm": 80}, None, False),
    ],
)
def test_the_rule(changes: dict[str, Any], cap: int | None, lowered: bool) -> None:
    rule = settings(**changes).rule()
    assert (rule.cap_bytes, rule.lowered) == (cap, lowered)
    assert rule.why


@pytest.mark.parametrize(
    ("version", "read_in"),
    [
        ("0.33", "0.33.0"),
        ("0.33.0", "0.33.0"),
        ("v0.22.0", "0.22.1"),
        ("0.22.1+cu129", "0.22.1"),
        ("0.33.1rc1", "0.33.0"),
        ("0.33.0.dev12", "0.33.0"),
    ],
)
def test_versions_resolve_by_their_first_two_numbers(version: str, read_in: str) -> None:
    assert tables_of(version).read_in == read_in


@pytest.mark.parametrize("version", ["0.34", "0.3", "1.0.0", "", "latest", "0.1.dev1916"])
def test_unknown_versions_name_the_known_ones(version: str) -> None:
    with pytest.raises(InputError, match=r"0\.20.*0\.33"):
        settings(version=version)


@pytest.mark.parametrize(
    ("version", "nearest"),
    [("0.34.0", "0.33"), ("0.19.2", "0.20"), ("0.3", "0.20"), ("0.2", "0.20"), ("9.9", "0.33")],
)
def test_an_unknown_version_suggests_the_nearest_by_number(version: str, nearest: str) -> None:
    """By spelling 0.3 was nearest to 0.33."""
    with pytest.raises(InputError, match=f"The nearest known one is {nearest}\\."):
        tables_of(version)


def test_a_newer_release_takes_the_newest_tables_with_a_warning() -> None:
    assert known_version("0.22.1") == ("0.22.1", None)
    version, warning = known_version("0.34.0")
    assert version == "0.33"
    assert warning is not None and "0.34.0 was not read" in warning
    assert known_version("1.0.0rc1")[0] == "0.33"
    for bad in ("0.19.2", "0.1.dev1916", "latest"):
        with pytest.raises(InputError, match="unknown vLLM version"):
            known_version(bad)


@pytest.mark.parametrize("changes", [{"world_size": 0}, {"sm": 9}])
def test_settings_out_of_range(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="out of range"):
        settings(**changes)


@pytest.mark.parametrize("cap", [262144, 131072, 524288, 64 * MIB, 400_000, 1, 18 * 14336])
def test_the_field_is_exact_after_vllm_has_read_it(cap: int) -> None:
    assert int(float(repr(field_mb(cap))) * 1024 * 1024) == cap


def test_flag_and_the_variable_beside_it() -> None:
    assert settings().flag(parse_size("256K")) == (
        '--compilation-config \'{"pass_config": {"fi_allreduce_fusion_max_size_mb": 0.25}}\''
    )
    off = '--compilation-config \'{"pass_config": {"fuse_allreduce_rms": false}}\''
    assert settings().flag(0) == off
    assert settings().environment(262144) == "VLLM_ALLREDUCE_USE_FLASHINFER=0"
    assert settings().environment(524288) is None
    assert settings(version="0.28").environment(262144) is None
