"""The plan: a pure function of a profile, on both sides of each of its rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewise.errors import ProfileError
from fusewise.profiles.bands import Band, Plan, Table, default_plan
from fusewise.profiles.plan import constant_in_bytes, crossovers, decide_points, derive
from fusewise.shape import Shape, format_size
from tests.samples import FUSED, UNFUSED, profile_of

CROSSING = {
    1: {FUSED: 5.0, UNFUSED: 8.0},
    256: {FUSED: 7.0, UNFUSED: 10.0},
    2048: {FUSED: 50.0, UNFUSED: 40.0},
}


def test_the_winner_changes_between_the_two_sizes_that_show_it() -> None:
    plan = derive(profile_of(CROSSING))
    table = plan.tables[0]
    assert [band.path for band in table.bands] == [FUSED, UNFUSED, UNFUSED]
    edge = table.bands[0].end_bytes
    assert edge is not None
    assert 2**20 < edge <= 8 * 2**20
    assert table.band_at(edge - 1).path == FUSED
    assert table.band_at(edge).path == UNFUSED
    (crossing,) = crossovers(decide_points(profile_of(CROSSING)))
    assert (crossing.before, crossing.after) == (FUSED, UNFUSED)
    assert crossing.above_bytes == 2**20
    assert crossing.below_bytes == 8 * 2**20


def test_above_the_largest_measured_size_the_baseline_runs_as_a_default() -> None:
    plan = derive(profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}, 64: {FUSED: 5.0, UNFUSED: 8.0}}))
    assert plan.band_at("all_reduce_rms_norm", 2048, 262144).path == FUSED
    beyond = plan.band_at("all_reduce_rms_norm", 2048, 262145)
    assert (beyond.path, beyond.origin) == (UNFUSED, "engine default")


def test_a_tie_keeps_what_is_there_and_says_so() -> None:
    tie = profile_of({1: {FUSED: 7.95, UNFUSED: 8.0}}, spread=0.02)
    (point,) = decide_points(tie)[2048]
    assert (point.chosen, point.fastest, point.verdict) == (UNFUSED, FUSED, "inconclusive")
    assert "tie" in point.note


@pytest.mark.parametrize(("fused_us", "chosen"), [(9.81, UNFUSED), (9.79, FUSED)])
def test_the_minimum_gain_is_two_percent(fused_us: float, chosen: str) -> None:
    profile = profile_of({1: {FUSED: fused_us, UNFUSED: 10.0}}, spread=0.0)
    assert decide_points(profile)[2048][0].chosen == chosen


def test_the_incumbent_of_a_larger_size_is_the_winner_of_the_smaller() -> None:
    profile = profile_of(
        {1: {FUSED: 5.0, UNFUSED: 8.0}, 64: {FUSED: 8.05, UNFUSED: 8.0}}, spread=0.0
    )
    assert [p.chosen for p in decide_points(profile)[2048]] == [FUSED, FUSED]


def test_a_path_measured_on_one_side_only_ends_at_the_next_measured_size() -> None:
    plan = derive(profile_of({1: {UNFUSED: 8.0}, 64: {FUSED: 5.0, UNFUSED: 8.0}}))
    assert plan.tables[0].bands[1].min_bytes == 262144


def test_without_a_backend_the_best_of_the_others_takes_its_sizes() -> None:
    rows = {t: {"native.one_shot": 3.0, FUSED: 5.0, UNFUSED: 8.0} for t in (1, 64)}
    whole = profile_of(rows)
    assert derive(whole).tables[0].bands[0].path == "native.one_shot"
    less = whole.without({"native.one_shot"})
    assert less is not None
    assert derive(less) == derive(profile_of({t: {FUSED: 5.0, UNFUSED: 8.0} for t in (1, 64)}))
    assert whole.without({"custom"}) is whole
    assert whole.without({"native.one_shot", FUSED, "nccl"}) is None


def test_a_tie_inside_a_band_is_silent() -> None:
    rows = {1: {FUSED: 5.0, UNFUSED: 8.0}, 64: {FUSED: 7.5, UNFUSED: 7.45}}
    (table,) = derive(profile_of(rows, spread=0.0)).tables
    assert (table.bands[0].end_bytes, table.bands[0].verdict) == (262145, "fuse")
    tie_only = derive(profile_of({64: {FUSED: 7.5, UNFUSED: 7.45}}, spread=0.0)).tables[0]
    assert tie_only.bands[0].verdict == "inconclusive"


def test_an_unmeasured_hidden_size_asks_the_nearest() -> None:
    small, large = profile_of(CROSSING), profile_of(CROSSING, hidden_size=8192)
    both = small.model_copy(update={"samples": small.samples + large.samples})
    plan = derive(both)
    nearest = [plan.table_for("all_reduce_rms_norm", h) for h in (1024, 2880, 7168)]
    assert [table.hidden_size for table in nearest if table] == [2048, 2048, 8192]
    assert plan.table_for("all_reduce", 2048) is None
    assert plan.band_at("all_reduce", 2048, 5).path == "nccl"


def test_a_plan_travels_and_its_digest_follows_its_decisions() -> None:
    plan = derive(profile_of(CROSSING))
    assert Plan.from_dict(plan.to_dict()) == plan
    other = derive(profile_of({**CROSSING, 1: {FUSED: 9.0, UNFUSED: 8.0}}))
    assert other.digest != plan.digest
    assert default_plan("bfloat16", UNFUSED).digest != plan.digest


@pytest.mark.parametrize(
    "bands",
    [
        [],
        [(0, 100), (50, None)],
        [(0, 100), (150, None)],
        [(5, None)],
        [(0, 100)],
        [(0, None), (5, None)],
        [(0, 0), (0, None)],
    ],
)
def test_bands_that_overlap_or_leave_a_gap_are_refused(bands: list[tuple[int, int | None]]) -> None:
    made = tuple(Band(a, b, UNFUSED, "fuse", "measured") for a, b in bands)
    with pytest.raises(ProfileError, match="bands of all_reduce hidden 8"):
        Table("all_reduce", 8, made, 1, 1)


@pytest.mark.parametrize(
    ("brackets", "answer"),
    [
        ({2048: (2**20, 2**22)}, None),
        ({2048: (2**20, 2**22), 4096: (2**22, 2**23)}, True),
        ({2048: (2**20, 2**21), 4096: (2**22, 2**23)}, False),
    ],
)
def test_whether_the_crossover_is_constant_in_bytes(
    brackets: dict[int, tuple[int, int]], answer: bool | None
) -> None:
    assert constant_in_bytes(brackets) is answer


TIMES = st.floats(min_value=1.0, max_value=1000.0)


@given(st.dictionaries(st.integers(1, 4096), st.tuples(TIMES, TIMES, TIMES), min_size=1))
def test_any_profile_gives_a_gapless_plan_that_never_picks_a_clear_loser(
    rows: dict[int, tuple[float, float, float]],
) -> None:
    names = (FUSED, "native.one_shot", UNFUSED)
    medians = {tokens: dict(zip(names, row, strict=True)) for tokens, row in rows.items()}
    profile = profile_of(medians, rounds=5, spread=0.0)
    (table,) = derive(profile).tables
    for point in decide_points(profile)[2048]:
        size = point.shape.message_bytes
        assert table.band_at(size).path == point.chosen, format_size(size)
        best = min(point.medians_us.values())
        assert point.medians_us[point.chosen] <= best / 0.98 + 1e-9


@pytest.mark.parametrize(("tokens", "below"), [(1, None), (2, "extrapolated")])
def test_below_the_smallest_measured_size_its_path_runs_and_nothing_is_claimed(
    tokens: int, below: str | None
) -> None:
    rows = {tokens: {FUSED: 5.0, UNFUSED: 8.0}, 64: {FUSED: 5.0, UNFUSED: 8.0}}
    (table,) = derive(profile_of(rows)).tables
    first = Shape(tokens, 2048, "bfloat16").message_bytes
    assert table.band_at(first).verdict == "fuse"
    if below is None:  # there is no smaller message than one token
        assert table.bands[0].min_bytes == 0 and table.bands[0].origin == "measured"
    else:
        band = table.band_at(first - 1)
        assert (band.path, band.verdict, band.origin) == (FUSED, "inconclusive", below)


def test_a_token_of_a_narrower_row_is_extrapolated() -> None:
    plan = derive(profile_of({tokens: {FUSED: 5.0, UNFUSED: 8.0} for tokens in (1, 64)}))
    for hidden_size, size, origin in (
        (1024, 2048, "extrapolated"),
        (1024, 4095, "extrapolated"),
        (1024, 4096, "measured"),
        (2048, 4095, "measured"),
        (4096, 8192, "measured"),
    ):
        band = plan.band_at("all_reduce_rms_norm", hidden_size, size)
        assert (band.origin, band.path) == (origin, FUSED)
        assert band.verdict == ("fuse" if origin == "measured" else "inconclusive")
