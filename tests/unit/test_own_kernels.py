"""What our kernels would save an engine: only where both were measured, and beyond noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusewise.engines.audit import audit
from fusewise.engines.cap import ExplicitCap
from fusewise.engines.own_kernels import OwnKernels, own_kernels
from fusewise.engines.sglang.dispatch import SGLangSettings
from fusewise.profiles import store
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import PathRecord, Profile, Sample
from fusewise.report import html
from tests import command_line
from tests.engine_profiles import COLUMN, MIB, TP2, measured

TUNED = Path(__file__).parents[2] / "benchmarks/results/two_gpus/profile_tp2.json"


def with_ours(times_us: dict[int, float], profile: Profile | None = None) -> Profile:
    """COLUMN's profile, and times of ours by message size; the second variant is slower."""
    profile = profile or measured({2048: COLUMN})
    names = ("native.one_shot", "native.one_shot:v2")
    return profile.model_copy(
        update={
            "paths": profile.paths
            + tuple(PathRecord(name=name, provider="native", fused=True) for name in names),
            "samples": profile.samples
            + tuple(
                Sample(
                    path=name,
                    num_tokens=size // 4096,
                    hidden_size=2048,
                    times_us=tuple(time_us * by * (1 + 0.001 * i) for i in range(9)),
                )
                for size, time_us in times_us.items()
                for name, by in zip(names, (1.0, 1.2), strict=True)
            ),
        }
    )


def test_the_fastest_of_ours_is_compared_with_what_runs_today() -> None:
    # Today: fused 7.3, 27, 50, and 387 by the two-shot.
    profile = with_ours({1 * MIB: 5.0, 4 * MIB: 27.1, 64 * MIB: 187.0})
    found = own_kernels(profile, TP2)
    assert found is not None
    assert (found.compared, found.faster_at) == (3, 2)
    assert (found.message_bytes, found.hidden_size) == (64 * MIB, 2048)
    assert found.most_us == pytest.approx(200, abs=1)


def test_beyond_the_engines_cap_its_unfused_path_is_today() -> None:
    tp4 = replace(TP2, world_size=4)  # its table ends at 2 MiB
    wins = {1 * MIB: (7.0, 12.0, 12.0), 4 * MIB: (20.0, 30.0, 33.0)}
    profile = with_ours({4 * MIB: 25.0}, measured({2048: wins}, world_size=4))
    found = own_kernels(profile, tp4)
    assert found is not None and found.most_us == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("time_us", [7.25, 9.0])
def test_within_noise_it_is_not_faster(time_us: float) -> None:
    found = own_kernels(with_ours({1 * MIB: time_us}), TP2)
    assert found == OwnKernels(1, 0, None, None, None, stale=False)
    assert "at none of 1 measured sizes" in str(found)


@pytest.mark.parametrize("times_us", [{}, {2 * MIB: 1.0}])
def test_nothing_is_said_where_nothing_compares(times_us: dict[int, float]) -> None:
    assert own_kernels(with_ours(times_us), TP2) is None


def test_what_full_mode_cannot_run_does_not_count() -> None:
    profile = with_ours({1 * MIB: 5.0, 64 * MIB: 187.0})
    assert audit(profile, TP2).own is not None
    assert audit(profile, TP2, explicit=ExplicitCap(2**20)).own is None  # then full is cap
    assert (
        audit(profile, replace(TP2, version="0.33", batch_invariant=True)).own is None
    )  # it does not fuse
    four = {1 * MIB: (7.0, 12.0, 12.0), 16 * MIB: (90.0, 95.0, 99.0), 32 * MIB: (190.0, 185.0, 199)}
    tp4 = with_ours(dict.fromkeys(four, 1.0), measured({2048: four}, world_size=4))
    found = own_kernels(tp4, replace(TP2, world_size=4))
    assert found is not None and found.message_bytes == 16 * MIB  # FlashInfer's workspace ends


def test_times_of_other_sources_need_a_new_tune() -> None:
    profile = with_ours({1 * MIB: 5.0})
    for kernels, stale in ((None, False), (profile.fingerprint.kernels, False), ("other", True)):
        found = own_kernels(profile, TP2, kernels)
        assert found is not None and found.stale == stale
        assert ("needs a new `fusewise tune`" in str(found)) == stale


def test_two_h200s_as_they_were_tuned() -> None:
    profile = store.load(TUNED)
    found = audit(profile, TP2).own
    assert found == OwnKernels(48, 48, pytest.approx(243.2, abs=0.1), 64 * MIB, 2048, stale=False)
    sglang = SGLangSettings("0.5.23", 90, 2, multicast=False, custom_v2=True)
    told = audit(profile, sglang).own  # up to its 2048 tokens
    assert told == OwnKernels(41, 41, pytest.approx(33.96, abs=0.01), 16 * MIB, 4096, stale=False)
    text = html.page(profile, derive(profile))
    assert text.count("<dt>our kernels</dt>") == 2
    assert "by up to 243.23 µs per call (at 64M, hidden 2048)" in text


def test_the_command_says_it_and_its_record_has_the_numbers() -> None:
    asked = ("audit", "--engine", "vllm", "--version", "0.33", "--profile")
    out, _ = command_line.run(*asked, str(TUNED))
    assert "faster than what runs today at 48 of 48 measured sizes" in " ".join(out.split())
    document = json.loads(command_line.run(*asked, str(TUNED), "--format", "json")[0])
    (row,) = document["summary"]["rows"]
    assert (row["native_compared"], row["native_faster_at"]) == (48, 48)
    out, _ = command_line.run(*asked, "nvidia-h200-tp2")
    assert "our kernels" not in out
