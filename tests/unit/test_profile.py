"""Profiles as files: what is read, what is refused and by which path in the document."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusewise
from fusewise.errors import ProfileError
from fusewise.profiles import store
from fusewise.profiles.schema import Profile, parse_profile
from tests.samples import FUSED, NODE, UNFUSED, profile_of

GOOD = profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}, 64: {FUSED: 5.3, UNFUSED: 6.8}})


def edited(*path: str | int, value: Any) -> str:
    document: Any = json.loads(GOOD.to_json())
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(document)


def test_a_profile_survives_its_file() -> None:
    text = GOOD.to_json()
    assert parse_profile(text, "f.json") == GOOD
    assert sum(line.startswith('  {"op"') for line in text.splitlines()) == len(GOOD.samples)


def test_a_profile_of_the_first_release_still_loads() -> None:
    """It called an excluded backend a path."""
    old = edited("excluded", value=[{"path": "multimem", "reason": "no multicast"}])
    (item,) = parse_profile(old, "f.json").excluded
    assert (item.backend, item.reason) == ("multimem", "no multicast")
    assert '"backend": "multimem"' in parse_profile(old, "f.json").to_json()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (edited("samples", 0, "times_us", 3, value=-1.0), r"\$\.samples\[0\]\.times_us\[3\]"),
        (edited("samples", 0, "times_us", 3, value=0), r"\$\.samples\[0\]\.times_us\[3\]"),
        (edited("samples", 0, "times_us", value=[]), r"\$\.samples\[0\]\.times_us"),
        (edited("samples", 1, "times_us", value=[5.0]), r"samples\[1\]\.times_us"),
        (edited("samples", 0, "num_tokens", value=0), r"\$\.samples\[0\]\.num_tokens"),
        (edited("samples", 0, "num_tokens", value=10**40), r"\$\.samples\[0\]\.num_tokens"),
        (edited("samples", 0, "num_tokens", value=1.5), r"\$\.samples\[0\]\.num_tokens"),
        (edited("samples", 0, "path", value="../x"), r"\$\.samples\[0\]\.path"),
        (edited("samples", 0, "path", value="nobody"), "nobody"),
        (edited("samples", 1, "path", value=FUSED), "measured twice"),
        (edited("samples", value=[]), r"\$\.samples"),
        (edited("bands", value=[[0, 5], [3, 9]]), r"\$\.bands"),
        (edited("fingerprint", "world_size", value="2"), r"\$\.fingerprint\.world_size"),
        (edited("fingerprint", "fabric", value="nv18/../.."), r"\$\.fingerprint\.fabric"),
        (edited("dtype", value="float8"), r"\$\.dtype"),
        (edited("schema_version", value=2), r"\$\.schema_version"),
        (edited("schema_version", value=True), r"\$\.schema_version"),
        ("[]", "is no profile: expected a JSON object, got list"),
        (GOOD.to_json().replace("{", '{"dtype": "float16",', 1), "'dtype' stands there twice"),
        ("", "not valid JSON"),
        (GOOD.to_json()[:-40], "not valid JSON"),
        (GOOD.to_json().replace("[5", "[NaN, 5", 1), "NaN is not a measurement"),
        (GOOD.to_json().replace("[5", "[Infinity, 5", 1), "Infinity is not a measurement"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (16 * 2**20 + 1), "is no profile"),
    ],
)
def test_a_broken_profile_is_refused_with_the_place(text: str, place: str) -> None:
    with pytest.raises(ProfileError, match=place):
        parse_profile(text, "f.json")


@settings(max_examples=200)
@given(st.data())
def test_no_damage_gets_through_as_anything_but_a_profile_error(data: st.DataObject) -> None:
    text = GOOD.to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    junk = data.draw(st.text(min_size=0, max_size=4))
    damaged = text[:at] + junk + text[at + data.draw(st.integers(0, 6)) :]
    try:
        profile = parse_profile(damaged, "f.json")
    except ProfileError:
        return
    assert isinstance(profile, Profile)
    assert all(0 < t < 1e9 for sample in profile.samples for t in sample.times_us)


def test_the_file_name_tells_device_ranks_dtype_and_fabric() -> None:
    assert GOOD.file_name == "device=NVIDIA_H200,tp=2,dtype=bfloat16,fabric=nv18.json"
    odd = NODE.model_copy(update={"device": "A/../B (x)", "multicast": True, "nodes": 2})
    name = GOOD.model_copy(update={"fingerprint": odd}).file_name
    assert name == "device=A_.._B_x,tp=2,nodes=2,dtype=bfloat16,fabric=nv18-multicast.json"
    assert "/" not in name


def test_differences_name_the_field_and_both_values() -> None:
    other = NODE.model_copy(update={"torch": "2.13.0"})
    assert NODE.differences(other, ("torch", "cuda")) == [
        "torch: 2.11.0 in the profile, 2.13.0 here"
    ]


def test_a_profile_is_loaded_by_a_public_name() -> None:
    assert fusewise.load("nvidia-h200-tp8") == store.load("nvidia-h200-tp8")
    assert "load" in fusewise.__all__
