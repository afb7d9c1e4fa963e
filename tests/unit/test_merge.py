"""Two profiles of one node become one, and nothing measured is lost or mixed."""

from __future__ import annotations

import pytest

from fusewise.errors import StaleProfileError
from fusewise.profiles.merge import LEFT_OUT, extended
from fusewise.profiles.schema import Exclusion, Profile
from tests.samples import FUSED, NODE, UNFUSED, profile_of

OLD = profile_of({t: {FUSED: 5.0, UNFUSED: 8.0} for t in (1, 64)})
NEW = profile_of({t: {FUSED: 4.0, UNFUSED: 7.0} for t in (64, 256)}, spread=0.02)


def excluding(profile: Profile, reason: str) -> Profile:
    """The profile without its fused path, and why."""
    smaller = profile.without([FUSED])
    assert smaller is not None
    gone = (Exclusion(backend=FUSED, reason=reason),)
    return smaller.model_copy(update={"excluded": gone})


def test_every_point_of_both_is_there_once_and_the_newer_one_wins() -> None:
    both = extended(OLD, NEW)
    assert [s.num_tokens for s in both.samples] == [1, 1, 64, 64, 256, 256]
    assert both.samples[2:] == NEW.samples
    assert Profile.model_validate(both.model_dump()) == both, "it is a valid profile"


def test_a_backend_that_failed_since_loses_its_old_timings() -> None:
    both = extended(OLD, excluding(NEW, "wrong elements"))
    assert FUSED not in {s.path for s in both.samples}
    assert [path.name for path in both.paths] == [UNFUSED]
    assert [item.reason for item in both.excluded] == ["wrong elements"]


def test_a_backend_that_was_only_left_out_keeps_them() -> None:
    both = extended(OLD, excluding(NEW, LEFT_OUT))
    assert {s.num_tokens for s in both.samples if s.path == FUSED} == {1}
    assert both.excluded == (), "it has timings"


def test_a_backend_that_works_by_now_is_no_longer_excluded() -> None:
    both = extended(excluding(OLD, "not installed"), NEW)
    assert both.excluded == ()
    assert {path.name for path in both.paths} == {FUSED, UNFUSED}


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": NODE.model_copy(update={"torch": "9"})},
        {"dtype": "float16"},
        {"baseline": "symm_mem.one_shot + rms_norm"},
    ],
)
def test_profiles_of_two_nodes_do_not_merge(change: dict[str, object]) -> None:
    with pytest.raises(StaleProfileError, match=next(iter(change)).replace("fingerprint", "torch")):
        extended(OLD, NEW.model_copy(update=change))


def test_timings_of_our_kernels_go_when_their_sources_changed() -> None:
    native = "native.one_shot"
    rows = {1: {native: 4.0, UNFUSED: 8.0}}
    old = profile_of(rows, node=NODE.model_copy(update={"kernels": "a"}))
    new = profile_of({64: rows[1]}, node=NODE.model_copy(update={"kernels": "b"}))
    both = extended(old, new)
    assert {s.num_tokens for s in both.samples if s.path == native} == {64}
    assert {s.num_tokens for s in both.samples if s.path == UNFUSED} == {1, 64}


def test_leaving_paths_out_drops_the_crossovers_that_were_stated_with_them() -> None:
    from fusewise.profiles import store

    seed = store.load("nvidia-h200-tp8")
    assert seed.crossovers
    smaller = seed.without(["multimem"])
    assert smaller is not None and smaller.crossovers == ()
