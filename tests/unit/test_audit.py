"""Audits and caps: the seed's four numbers, and measured profiles with losses of every kind."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fusewise.engines.audit import audit, explain
from fusewise.engines.cap import ExplicitCap, decide_cap
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.errors import InputError, StaleProfileError
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import load
from tests.engine_profiles import COLUMN, MIB, TP2, Times, measured

SEED = VllmSettings("0.33", 90, 8, multicast=True, flashinfer_backend="trtllm")


@pytest.fixture(scope="module")
def seed() -> Profile:
    return load("nvidia-h200-tp8")


def test_the_seed(seed: Profile) -> None:
    result = audit(seed, SEED, profile_level="flag")
    assert [row.delta_us for row in result.rows] == [0.86, 0.05, -1.87, -4.30]
    assert [row.verdict for row in result.rows] == [
        "fusion wins", "tie", "fusion loses", "fusion loses",
    ]  # fmt: skip
    assert all(row.fused_today for row in result.rows)
    (band,) = result.bands
    assert (band.above_bytes, band.to_bytes) == (256 * 1024, 512 * 1024)
    assert (band.worst_cost_us, band.worst_at_bytes) == (4.30, 512 * 1024)
    assert "256K–512K" in str(band)
    assert (result.cap.cap_bytes, result.cap.level, result.cap.origin) == (
        262144, "flag", "published",
    )  # fmt: skip
    assert "1.87" in result.cap.why
    assert result.best_cap_bytes == 262144
    assert str(result.threshold) == "524288 (512K)"
    tokens = {cap.hidden_size: cap.max_tokens for cap in result.hidden_caps}
    assert tokens == {2048: 64, 4096: 32, 7168: 18}
    assert result.flag is not None
    assert '"fi_allreduce_fusion_max_size_mb": 0.25' in result.flag
    assert result.environment == "VLLM_ALLREDUCE_USE_FLASHINFER=0"


@pytest.mark.parametrize(
    ("changes", "cap", "level"),
    [
        ({"multicast": False}, 524288, "engine default"),
        ({"symm_mem": False}, 524288, "engine default"),
        ({"nccl_symm_mem": True}, 131072, "rule"),
        ({"nccl_symm_mem": True, "multicast": False}, 131072, "rule"),
        ({"version": "0.22"}, 262144, "packaged profile"),
    ],
)
def test_the_rule_answers_where_the_seed_holds_no_such_path(
    seed: Profile, changes: dict[str, Any], cap: int, level: str
) -> None:
    decision = decide_cap(seed, replace(SEED, **changes), profile_level="packaged profile")
    assert (decision.cap_bytes, decision.level) == (cap, level)


@pytest.mark.parametrize("changes", [{}, {"multicast": False}, {"nccl_symm_mem": True}])
def test_an_explicit_cap_wins_over_everything(seed: Profile, changes: dict[str, Any]) -> None:
    explicit = ExplicitCap(400_000, "flag")
    result = audit(seed, replace(SEED, **changes), explicit=explicit, hidden_sizes=[2048])
    assert (result.cap.cap_bytes, result.cap.level, result.cap.origin) == (
        400_000, "flag", "explicit",
    )  # fmt: skip
    assert [cap.max_tokens for cap in result.hidden_caps] == [97]
    assert decide_cap(None, SEED, explicit=ExplicitCap(0)).cap_bytes == 0
    with pytest.raises(InputError):
        ExplicitCap(-1)


def test_explain_names_both_paths_and_the_level(seed: Profile) -> None:
    decision = decide_cap(seed, SEED, profile_level="packaged profile")
    at, above = explain(SEED, decision, 262144, 2048), explain(SEED, decision, 262160, 2048)
    assert (at.today, at.with_cap) == ("flashinfer.one_shot", "flashinfer.one_shot")
    assert (above.today, above.with_cap) == ("flashinfer.one_shot", "multimem + rms_norm")
    assert above.level == "packaged profile"
    beyond = explain(SEED, decision, 2 * MIB, 2048)
    assert (beyond.today, beyond.with_cap) == ("multimem + rms_norm", "multimem + rms_norm")
    unknown = explain(replace(SEED, sm=80), decide_cap(None, replace(SEED, sm=80)), 4096, 2048)
    assert (unknown.cap_bytes, unknown.with_cap) == (None, "custom + rms_norm")


def test_notes_say_what_the_numbers_leave_out(seed: Profile) -> None:
    new = " ".join(audit(seed, SEED).notes)
    old = " ".join(audit(seed, replace(SEED, version="0.22")).notes)
    assert "about FlashInfer's trtllm backend" in new
    assert "VLLM_ALLREDUCE_USE_FLASHINFER=0" in new
    assert "mnnvl" not in old
    assert "VLLM_ALLREDUCE_USE_FLASHINFER" not in old
    assert "otherwise" in " ".join(audit(seed, replace(SEED, multicast=False)).notes)


def test_times_of_trtllm_do_not_decide_about_mnnvl(seed: Profile) -> None:
    """From 0.25 on, where multicast works, vLLM fuses with another kernel than was measured."""
    auto = replace(SEED, flashinfer_backend="auto")
    result = audit(seed, auto)
    assert (result.cap.cap_bytes, result.cap.level) == (524288, "engine default")
    assert {row.fused_path for row in result.rows} == {"flashinfer.mnnvl"}
    assert {row.verdict for row in result.rows} == {"not measured"}
    assert (result.bands, result.best_cap_bytes) == ((), None)
    assert "no times of mnnvl" in " ".join(result.notes)
    renamed = [
        s.model_copy(update={"path": "flashinfer.mnnvl"}) if s.path == "flashinfer.one_shot" else s
        for s in seed.samples
    ]
    record = seed.path("flashinfer.one_shot").model_copy(update={"name": "flashinfer.mnnvl"})
    measured = seed.model_copy(
        update={"samples": tuple(renamed), "paths": (*seed.paths, record), "deltas": ()}
    )
    assert decide_cap(measured, auto).cap_bytes == 262144
    assert decide_cap(measured, SEED).level == "rule"
    assert "no times of mnnvl" not in " ".join(audit(measured, auto).notes)


def test_records_are_plain_json(seed: Profile) -> None:
    result = audit(seed, SEED)
    assert json.loads(json.dumps(result.to_record()))["cap"]["cap_bytes"] == 262144
    assert len(json.loads(json.dumps(result.rows_record()))) == 4


def test_a_measured_cap_below_the_engines() -> None:
    result = audit(measured({2048: COLUMN}), TP2, profile_level="user profile")
    assert (result.cap.cap_bytes, result.cap.level, result.cap.origin) == (
        4 * MIB, "user profile", "measured",
    )  # fmt: skip
    assert [row.unfused_path for row in result.rows][-2:] == ["nccl + rms_norm"] * 2
    (band,) = result.bands
    assert (band.above_bytes, band.to_bytes) == (4 * MIB, 64 * MIB)
    assert band.worst_cost_us == pytest.approx(105, abs=0.5)
    assert result.rows[-1].fused_path == "flashinfer.two_shot"


def test_the_best_known_path_may_ask_for_a_lower_cap() -> None:
    column = {**COLUMN, 4 * MIB: (27.0, 30.0, 26.0)}  # NCCL beats both where custom would run
    result = audit(measured({2048: column}), TP2)
    assert result.cap.cap_bytes == 4 * MIB
    assert result.best_cap_bytes == 1 * MIB


def test_a_measured_cap_may_exceed_the_engines_table() -> None:
    tp4 = replace(TP2, world_size=4)  # its table: 2 MiB
    wins: dict[int, Times] = {1 * MIB: (7, 12, 12), 4 * MIB: (20, 30, 30)}
    assert decide_cap(measured({2048: wins}, world_size=4), tp4).cap_bytes == 4 * MIB
    loses = {**wins, 4 * MIB: (31.0, 30.0, 30.0)}
    result = audit(measured({2048: loses}, world_size=4), tp4)
    assert result.cap.cap_bytes == 1 * MIB
    assert result.bands == ()  # above the engine's table nothing is fused today


def test_a_loss_at_the_smallest_size_means_never_fuse() -> None:
    loses: dict[int, Times] = {1 * MIB: (13.0, 12.0, None), 64 * MIB: (387.0, None, 282.0)}
    result = audit(measured({2048: loses}), TP2)
    assert result.cap.cap_bytes == 0
    assert [cap.max_tokens for cap in result.hidden_caps] == [0]


def test_two_losing_bands_with_a_win_between() -> None:
    column = {**COLUMN, 1 * MIB: (13.0, 12.0, None)}
    bands = audit(measured({2048: column}), TP2).bands
    assert [(b.above_bytes, b.to_bytes) for b in bands] == [(0, MIB), (4 * MIB, 64 * MIB)]


@pytest.mark.parametrize("changes", [{"world_size": 4}, {"sm": 100}, {"dtype": "float16"}])
def test_another_nodes_profile_is_refused(seed: Profile, changes: dict[str, Any]) -> None:
    with pytest.raises(StaleProfileError, match="does not describe this node"):
        audit(seed, replace(SEED, **changes))


def test_a_cpu_profile_is_refused() -> None:
    profile = measured({2048: COLUMN}, device_type="cpu", device="some cpu", fabric="shm")
    with pytest.raises(StaleProfileError, match="device_type cpu"):
        decide_cap(profile, TP2)


def test_an_engine_that_does_not_fuse_here_has_no_cap(seed: Profile) -> None:
    decision = decide_cap(None, replace(SEED, sm=80))
    assert (decision.cap_bytes, decision.level) == (None, "engine default")
