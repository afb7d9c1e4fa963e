"""Two profiles side by side: noise is no difference, and a difference is not lost in noise."""

from __future__ import annotations

import pytest

from fusewise.errors import InputError
from fusewise.profiles import store
from fusewise.profiles.compare import compare
from fusewise.profiles.schema import Profile, Sample
from fusewise.report.comparison import comparison
from tests.samples import FUSED, NODE, UNFUSED, jittered, profile_of


def with_times(profile: Profile, factor: float, seed: int, spread: float = 0.01) -> Profile:
    """Another run of the node: every median times ``factor``, with noise of its own."""
    samples = tuple(
        Sample(**{
            **s.model_dump(),
            "times_us": tuple(jittered(factor * sorted(s.times_us)[len(s.times_us) // 2],
                                       seed + i, len(s.times_us), spread)),
        })
        for i, s in enumerate(profile.samples)
    )  # fmt: skip
    return profile.model_copy(update={"samples": samples})


FIRST = profile_of({t: {FUSED: 5.0, UNFUSED: 8.0} for t in (1, 64, 256)})


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [
        (1.0, 0.01, "same"),
        (1.015, 0.001, "same"),  # clear of noise, and too little to matter
        (1.06, 0.01, "slower"),
        (0.94, 0.01, "faster"),
        (1.06, 0.5, "same"),  # as large, and lost in noise
    ],
)
def test_a_verdict_needs_an_interval_clear_of_the_least_gain(
    factor: float, spread: float, verdict: str
) -> None:
    first = with_times(FIRST, 1.0, 100, spread)
    found = compare(first, with_times(FIRST, factor, 200, spread))
    assert {change.verdict for change in found.changes} == {verdict}
    assert len(found.changes) == 6
    assert (found.first_only, found.second_only) == (0, 0)


def test_only_common_times_are_compared_and_the_rest_is_counted() -> None:
    second = profile_of({64: {FUSED: 5.0, UNFUSED: 8.0, "custom + rms_norm": 7.0}})
    found = compare(FIRST, second)
    assert {change.shape.num_tokens for change in found.changes} == {64}
    assert (found.first_only, found.second_only) == (4, 1)


def test_a_decision_that_changed_says_what_the_old_one_costs_where_it_changed() -> None:
    turned = profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}, 64: {FUSED: 9.0, UNFUSED: 8.0}})
    (found,) = compare(FIRST, turned).disagreements
    assert (found.shape.num_tokens, found.first_path, found.second_path) == (64, FUSED, UNFUSED)
    assert found.clear == "clear"
    assert found.cost is not None
    assert found.cost.low < found.cost.median == pytest.approx(1.0, abs=0.1)
    # The other way round the loss is that of the unfused path where fusing wins.
    (back,) = compare(turned, FIRST).disagreements
    assert back.cost is not None and back.cost.median == pytest.approx(3.0, abs=0.1)


def test_a_decision_within_noise_or_without_the_path_is_called_that() -> None:
    tie = profile_of({64: {FUSED: 7.95, UNFUSED: 8.0}})
    (found,) = compare(FIRST, tie).disagreements
    assert found.clear == "noise"
    gone = profile_of({64: {UNFUSED: 8.0}})
    (found,) = compare(FIRST, gone).disagreements
    assert (found.clear, found.cost) == ("not measured", None)


def test_published_times_have_no_spread_and_their_own_deltas() -> None:
    two, eight = store.load("nvidia-h200-tp2"), store.load("nvidia-h200-tp8")
    found = compare(two, eight)
    assert {change.verdict for change in found.changes} == {"no spread"}
    costs = {d.shape.message_bytes // 1024: d.cost for d in found.disagreements}
    assert {size: cost.median for size, cost in costs.items() if cost} == {512: 4.30}
    assert {d.clear for d in found.disagreements} == {"no spread"}


def test_two_dtypes_do_not_compare() -> None:
    with pytest.raises(InputError, match="two dtypes"):
        compare(FIRST, FIRST.model_copy(update={"dtype": "float16"}))


def test_the_records_name_fields_that_differ_and_show_noise_only_when_asked() -> None:
    second = with_times(FIRST, 1.06, 200).model_copy(
        update={"fingerprint": NODE.model_copy(update={"torch": "2.13.0"})}
    )
    fields, decisions, times, counts = comparison(FIRST, second, compare(FIRST, second), False)
    assert fields.records == [{"field": "torch", "first": "2.11.0", "second": "2.13.0"}]
    assert (decisions.records, len(times.records)) == ([], 6)
    assert "same path at every size" in decisions.notes[0]
    assert "6 of 6 common times differ beyond noise: the second is slower at 6" in counts.notes[0]
    quiet = compare(FIRST, FIRST)
    fields, _, times, _ = comparison(FIRST, FIRST, quiet, every=False)
    assert (times.records, times.notes) == (
        [],
        ("None of 6 is known to differ beyond noise; --all shows all.",),
    )
    assert (fields.records, len(fields.notes)) == ([], 1)
    assert len(comparison(FIRST, FIRST, quiet, every=True)[2].records) == 6


def test_each_operation_has_its_own_tables() -> None:
    plain = Sample(
        op="all_reduce", path="nccl", num_tokens=1, hidden_size=2048, times_us=(5.0, 5.1)
    )
    both = FIRST.model_copy(update={"samples": (*FIRST.samples, plain)})
    names = [part.name for part in comparison(both, both, compare(both, both), every=True)]
    ops = ("all_reduce_rms_norm", "all_reduce")
    assert names == ["fields", *["decisions"] * 2, *["times"] * 2, "counts"]
    titles = [part.title for part in comparison(both, both, compare(both, both), every=True)]
    assert titles[1:-1] == [f"{what}: {op}" for what in ("Decisions", "Times") for op in ops]
    nothing = profile_of({9: {FUSED: 5.0}})
    assert (
        "0 of 0 common times"
        in comparison(FIRST, nothing, compare(FIRST, nothing), True)[-1].notes[0]
    )
