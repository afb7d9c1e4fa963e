"""The packaged profile says what vLLM issue 44079 prints, and its bands follow from it."""

from __future__ import annotations

from importlib import resources

import pytest

from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile, parse_profile

ISSUE = [  # tokens, bytes, fused µs, unfused µs, all-reduce, delta µs
    (48, 192 * 1024, 10.4, 11.2, "custom", 0.86),
    (64, 256 * 1024, 12.1, 12.1, "multimem", 0.05),
    (96, 384 * 1024, 15.0, 13.1, "multimem", -1.87),
    (128, 512 * 1024, 17.9, 13.6, "multimem", -4.30),
]


@pytest.fixture(scope="module")
def text() -> str:
    packaged = resources.files("fusewise").joinpath("profiles", "data")
    return packaged.joinpath("nvidia-h200-tp8.json").read_text("utf-8")


@pytest.fixture(scope="module")
def profile(text: str) -> Profile:
    return parse_profile(text, "nvidia-h200-tp8")


def test_every_number_of_the_issue(profile: Profile) -> None:
    rows = profile.points()[2048]
    assert [shape.num_tokens for shape in rows] == [row[0] for row in ISSUE]
    for (shape, row), (_, size, fused, unfused, backend, _) in zip(
        rows.items(), ISSUE, strict=True
    ):
        assert shape.message_bytes == size
        assert row["flashinfer.one_shot"].times_us == (fused,)
        assert row[f"{backend} + rms_norm"].times_us == (unfused,)
        assert len(row) == 2
    assert [d.delta_us for d in profile.deltas] == [row[5] for row in ISSUE]
    stated = {c.hidden_size: c.message_bytes for c in profile.crossovers}
    assert stated == {2048: 262144, 4096: 262144, 7168: 262144}


def test_origin_and_node(profile: Profile) -> None:
    assert profile.provenance.origin == "published"
    assert "44079" in profile.provenance.source
    mark = profile.fingerprint
    assert (mark.sm, mark.world_size, mark.fabric, mark.multicast) == (90, 8, "nv18", True)
    assert (mark.torch, mark.driver, mark.flashinfer) == (None, None, "0.6.11.post2")


def test_stored_as_the_schema_writes_it(text: str, profile: Profile) -> None:
    assert profile.to_json() == text


def test_bands_change_hands_at_256k(profile: Profile) -> None:
    (table,) = derive(profile).tables
    assert table.band_at(262144).path == "flashinfer.one_shot"
    assert table.band_at(262145).path == "multimem + rms_norm"
    assert table.band_at(524288).path == "multimem + rms_norm"
    assert table.band_at(524289).origin == "engine default"
    assert table.band_at(table.validated_from).origin == "published"
    below = table.band_at(table.validated_from - 1)
    assert (below.path, below.origin) == ("flashinfer.one_shot", "extrapolated")
