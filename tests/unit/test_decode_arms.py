"""The plans a decode run compares, and the seed's ablation on the seed's own numbers."""

from __future__ import annotations

import pytest

from fusewise.decode.arms import Arm, arms_for, profile_without
from fusewise.decode.config import DecodeSettings
from fusewise.decode.models import check_split, shape_named
from fusewise.decode.results import document, records, section
from fusewise.engines import audit as auditing
from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.errors import InputError
from fusewise.graph.decide import TokenRange, decide
from fusewise.operation import all_reduce_of
from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile
from fusewise.shape import parse_size

HIDDEN = 2048  # 4 KiB per token in bf16
SEED = VllmSettings("0.20", sm=90, world_size=8, multicast=True)


@pytest.fixture(scope="module")
def seed() -> Profile:
    return store.load("nvidia-h200-tp8")


def _path(arm: Arm, tokens: int) -> str:
    return arm.plan.band_at("all_reduce_rms_norm", HIDDEN, tokens * 2 * HIDDEN).path


def test_the_seeds_arms_differ_exactly_in_the_losing_band(seed: Profile) -> None:
    arms = {arm.name: arm for arm in arms_for(seed, HIDDEN, SEED)}
    assert list(arms) == ["unfused", "engine-cap", "effective-cap", "measured"]
    for tokens, fused_by in {
        48: {"engine-cap", "effective-cap", "measured"},
        64: {"engine-cap", "effective-cap", "measured"},
        65: {"engine-cap"},
        96: {"engine-cap"},
        128: {"engine-cap"},
        129: set(),
    }.items():
        fused = {name for name, arm in arms.items() if _path(arm, tokens) == "flashinfer.one_shot"}
        # Between two measured sizes the plan interpolates; the caps do not.
        assert fused - {"measured"} == fused_by - {"measured"}, tokens
        if tokens not in (65,):
            assert fused == fused_by, tokens


def test_an_engines_arm_names_only_paths_that_were_measured(seed: Profile) -> None:
    measured = {path.name for path in seed.paths} | {seed.baseline}
    bare = {all_reduce_of(name) for name in measured}
    for arm in arms_for(seed, HIDDEN, SEED):
        assert arm.plan.paths() <= measured | bare


def test_the_ablation_flips_the_band_back(seed: Profile) -> None:
    """The seed: without multimem the 256–384 KB band is a win for fusing again.

    Its custom all-reduce at 96 tokens is known by the delta only (+1.48 µs for fusing), so with
    multimem gone the profile holds no rival there, as the verdict should have it.
    """
    without = derive(profile_without(seed, ["multimem"]))
    at = TokenRange(96, 96)
    assert decide(derive(seed), HIDDEN, at, False).choice == "leave"
    assert decide(without, HIDDEN, at, False).choice == "fuse"


def test_the_ablation_in_the_audit_gives_the_engine_its_cap_back(seed: Profile) -> None:
    off = VllmSettings("0.20", sm=90, world_size=8, multicast=True, symm_mem=False)
    assert auditing.audit(seed, SEED).cap.cap_bytes == parse_size("256K")
    assert auditing.audit(seed, off).cap.cap_bytes == parse_size("0.5M")


def test_a_further_measured_arm_per_name_left_out(seed: Profile) -> None:
    arms = arms_for(seed, HIDDEN, SEED, without=["multimem"])
    assert arms[-1].name == "measured without multimem"
    assert "multimem + rms_norm" not in arms[-1].plan.paths()


@pytest.mark.parametrize("name", ["native", "gloo"])
def test_leaving_out_what_is_not_there_is_an_error(seed: Profile, name: str) -> None:
    with pytest.raises(InputError, match="cannot leave that out"):
        profile_without(seed, [name])


def test_an_explicit_engine_cap_wins(seed: Profile) -> None:
    arms = {arm.name: arm for arm in arms_for(seed, HIDDEN, SEED, engine_cap_bytes=2**18)}
    assert _path(arms["engine-cap"], 64) == "flashinfer.one_shot"
    assert _path(arms["engine-cap"], 65) != "flashinfer.one_shot"


ROWS = [
    {
        "phase": "decode", "tokens": 8, "message_bytes": 2048, "arm": arm, "path": f"of {arm}",
        "graph": "leave", "tokens_per_run": 800, "times_s": times_s, "logits_difference": 0.0,
        "rounding_difference": 0.0,
    }
    for arm, times_s in (("unfused", [2.0, 4.0, 3.0]), ("measured", [1.0, 2.0, 1.0]))
]  # fmt: skip


def test_ratios_are_taken_within_rounds() -> None:
    unfused, measured = records(ROWS)
    assert (unfused["ratio"], unfused["tokens_per_s"]) == (1.0, 800 / 3.0)
    assert (measured["ratio"], measured["ratio_low"], measured["ratio_high"]) == (2.0, 2.0, 3.0)
    assert measured["best"] and not unfused["best"]


def test_arms_that_run_the_same_are_starred_alike() -> None:
    """The star was on whichever of them noise had put first."""
    alike = [row | {"path": "nccl + rms_norm"} for row in ROWS]
    assert [row["best"] for row in records(alike)] == [True, True]
    other_graph = [alike[0], alike[1] | {"graph": "fuse"}]
    assert [row["best"] for row in records(other_graph)] == [False, True]


def test_the_document_keeps_every_round() -> None:
    made = document(
        ROWS, settings={}, fingerprint={}, arms=[], sites={}, unreached=[("prefill", 7)],
        command="", created="", fusewise="",
    )  # fmt: skip
    assert [row["times_s"] for row in made["rows"]] == [row["times_s"] for row in ROWS]
    assert made["unreached"] == [{"phase": "prefill", "tokens": 7}]
    assert "times_s" not in section(ROWS, "title", []).records[0]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "gpt"}, {"num_layers": 0}, {"num_layers": 3}, {"batches": (0,)}, {"batches": ()},
        {"steps": 0}, {"repeats": 4}, {"context": 0}, {"prefill_tokens": (2**21,)},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change: dict[str, object]) -> None:
    good: dict[str, object] = {
        "model": "tiny", "num_layers": 1, "dtype": "float32", "batches": (1,),
        "prefill_tokens": (), "steps": 1, "repeats": 5, "context": 1, "compiler": "interpreted",
    }  # fmt: skip
    DecodeSettings(**good)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        DecodeSettings(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(("world_size", "fits"), [(2, True), (3, False), (4, False)])
def test_heads_are_shared_out_evenly_or_not_at_all(world_size: int, fits: bool) -> None:
    shape = shape_named("tiny")  # 4 heads, 2 of keys and values
    if fits:
        check_split(shape, world_size)
        return
    with pytest.raises(InputError, match="expected 2 ranks"):
        check_split(shape, world_size)
