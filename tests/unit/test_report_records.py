"""Records: what a profile and a plan say, written down without loss."""

from __future__ import annotations

import json

import pytest

from fusewise.node import Fingerprint
from fusewise.profiles.bands import default_plan
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import (
    Exclusion,
    PathRecord,
    Profile,
    Provenance,
    PublishedCrossover,
    Sample,
)
from fusewise.report.crossings import NO_LIMIT, constancy, crossings, rounded_size
from fusewise.report.records import bands, excluded, identity, measurements, paths, tables
from fusewise.report.text import render_sections
from tests.samples import sample

FUSED, UNFUSED = "native.one_shot", "nccl + rms_norm"
KIB = 1024


def profile(*samples, **changes):
    fields = {
        "provenance": Provenance(
            origin="measured", source="a test", created="2026-01-02", fusewise="0.1.0"
        ),
        "fingerprint": Fingerprint(device_type="cuda", device="X", world_size=2, fabric="nv18"),
        "dtype": "bfloat16",
        "baseline": UNFUSED,
        "paths": (
            PathRecord(name=FUSED, provider="fusewise", fused=True),
            PathRecord(name=UNFUSED, provider="torch", fused=False),
        ),
        "samples": samples,
    }
    return Profile(**(fields | changes))


def crossing_between(low_kib, high_kib, hidden_size=2048):
    """The fused path wins at ``low_kib`` and loses at ``high_kib``, by as much."""
    return (
        sample(FUSED, low_kib, 5.0, hidden_size),
        sample(UNFUSED, low_kib, 8.0, hidden_size),
        sample(FUSED, high_kib, 13.0, hidden_size),
        sample(UNFUSED, high_kib, 10.0, hidden_size),
    )


def test_a_measurement_row_holds_every_path_and_the_decision():
    row, other = measurements(profile(*crossing_between(64, 256))).records
    assert row == {
        "op": "all_reduce_rms_norm",
        "hidden_size": 2048,
        "num_tokens": 16,
        "message_bytes": 64 * KIB,
        "size": "64K",
        "median_us[native.one_shot]": 5.0,
        "median_us[nccl + rms_norm]": 8.0,
        "fastest": FUSED,
        "chosen": FUSED,
        "gain_us": 3.0,
        "gain_low_us": 3.0,
        "gain_high_us": 3.0,
        "verdict": "fuse",
        "note": None,
    }
    assert (other["chosen"], other["gain_us"], other["verdict"]) == (UNFUSED, -3.0, "do not fuse")


def test_a_tie_names_the_fastest_and_keeps_the_incumbent():
    section = measurements(profile(sample(FUSED, 64, 9.9), sample(UNFUSED, 64, 10.0)))
    (row,) = section.records
    assert (row["fastest"], row["chosen"]) == (FUSED, UNFUSED)
    assert "tie" in row["note"]
    assert section.columns[-1].key == "note"
    text = render_sections([section], "table", terminal=False)
    assert "*10.00" in text
    assert "*9.90" not in text


def test_a_path_not_admitted_at_a_size_is_an_empty_cell():
    section = measurements(profile(sample(UNFUSED, 64, 8.0), *crossing_between(128, 256)))
    assert section.records[0]["median_us[native.one_shot]"] is None
    assert section.records[0]["gain_us"] is None
    assert section.records[0]["verdict"] == "inconclusive"
    rows = json.loads(render_sections([section], "json"))["measurements"]["rows"]
    assert [row["path"] for row in rows if row["message_bytes"] == 64 * KIB] == [UNFUSED]


def test_a_published_time_has_no_interval():
    section = measurements(
        profile(sample(FUSED, 64, 5.0, rounds=1), sample(UNFUSED, 64, 8.0, rounds=1))
    )
    (row,) = section.records
    assert (row["gain_us"], row["gain_low_us"], row["gain_high_us"]) == (3.0, None, None)
    assert "gain_low_us" not in [column.key for column in section.columns]
    assert section.notes[1].endswith("no interval was published.")
    assert [row["time_low_us"] for row in section.rows] == [None, None]


def test_there_is_nothing_to_fuse_in_a_plain_all_reduce():
    section = measurements(
        profile(
            *crossing_between(64, 256),
            sample("nccl", 64, 6.0, op="all_reduce"),
            sample(FUSED, 64, 4.0, op="all_reduce"),
        ),
        "all_reduce",
    )
    (row,) = section.records
    assert (row["gain_us"], row["verdict"]) == (None, None)
    assert row["chosen"] == FUSED
    assert "verdict" not in [column.key for column in section.columns]


def test_bands_have_no_gap_and_say_where_they_come_from():
    here = profile(*crossing_between(64, 256))
    rows = bands(derive(here)).records[1:]
    assert [row["path"] for row in rows] == [FUSED, UNFUSED, UNFUSED]
    assert [row["origin"] for row in rows] == ["measured", "measured", "engine default"]
    assert [row["end_bytes"] for row in rows[:-1]] == [row["min_bytes"] for row in rows[1:]]
    assert (rows[0]["from"], rows[0]["to"], rows[-1]["to"]) == ("64K", "128K", "…")
    empty = bands(default_plan("bfloat16", UNFUSED))
    assert not empty.records
    assert "no profile applies" in empty.notes[0]


def test_a_crossover_comes_with_its_bracket_and_its_estimate():
    (row,) = crossings(profile(*crossing_between(64, 256))).records
    assert (row["before"], row["after"]) == (FUSED, UNFUSED)
    assert (row["above_bytes"], row["below_bytes"]) == (64 * KIB, 256 * KIB)
    assert row["estimate_bytes"] == 128 * KIB
    assert (row["between"], row["near"]) == ("64K and 256K", "128K")


def note_of(*samples, **changes):
    (note,) = crossings(profile(*samples, **changes)).notes
    return note


def test_one_hidden_size_cannot_tell_whether_it_is_constant_in_bytes():
    assert note_of(*crossing_between(64, 256)) == (
        "Fusing stops winning between 64K and 256K at hidden 2048. "
        "Constant in bytes: unknown: one hidden size measured."
    )


def test_brackets_that_touch_may_be_constant_and_brackets_apart_are_not():
    touching = note_of(*crossing_between(64, 256), *crossing_between(256, 1024, 4096))
    assert touching.endswith("Constant in bytes: possible, at 256K.")
    overlapping = note_of(*crossing_between(64, 256), *crossing_between(128, 1024, 4096))
    assert overlapping.endswith("Constant in bytes: possible, between 128K and 256K.")
    apart = note_of(*crossing_between(64, 256), *crossing_between(512, 1024, 4096))
    assert apart.endswith("Constant in bytes: no.")


def test_fusing_that_never_ends_or_never_starts_is_said_so():
    wins = (sample(FUSED, 64, 5.0), sample(UNFUSED, 64, 8.0))
    loses = (sample(FUSED, 512, 8.0, 4096), sample(UNFUSED, 512, 5.0, 4096))
    assert note_of(*wins) == "A fused path is still chosen at the largest measured size."
    assert note_of(*loses) == "No fused path is chosen at any measured size."
    assert note_of(*wins, *loses) == (
        "Fusing stops winning above 64K at hidden 2048; below 512K at hidden 4096. "
        "Constant in bytes: possible, between 64K and 512K."
    )
    assert constancy({2048: (512, NO_LIMIT), 4096: (0, 256)}).endswith("Constant in bytes: no.")
    assert note_of(sample("nccl", 64, 5.0, op="all_reduce")) == (
        "No measurement of all_reduce_rms_norm."
    )


def test_the_last_of_several_changes_counts():
    back_and_forth = (*crossing_between(64, 128), *crossing_between(256, 512))
    assert "between 256K and 512K" in note_of(*back_and_forth)


def test_a_published_crossover_is_its_own_bracket():
    published = (PublishedCrossover(hidden_size=4096, message_bytes=256 * KIB),)
    section = crossings(profile(*crossing_between(256, 384), crossovers=published))
    assert section.records[1]["between"] == "as published"
    assert section.records[1]["before"] is None
    assert section.notes[0].endswith("Constant in bytes: possible, at 256K.")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (1023, "1023B"), (1024, "1K"), (262144, "256K"), (4589580, "4.38M"),
     (2**20 - 1, "1024K"), (2**20, "1M"), (2**26 + 1, "64M"), (3 * 2**30 // 2, "1.5G")],
)  # fmt: skip
def test_sizes_keep_three_digits(size, text):
    assert rounded_size(size) == text


def test_excluded_paths_and_numerics_and_identity():
    here = profile(
        *crossing_between(64, 256), excluded=(Exclusion(backend="multimem", reason="no multicast"),)
    )
    (left_out,) = excluded(here).rows
    assert left_out == {"dtype": "bfloat16", "backend": "multimem", "reason": "no multicast"}
    assert paths(here).records[0]["accumulation"] is None
    known = {row["fact"]: row["value"] for row in identity(here).records}
    assert known["world_size"] == 2
    assert "driver" not in known  # unknown here: no row rather than an empty one
    assert known["multicast"] is False
    assert identity(here).rows[0]["driver"] is None  # machines get every field


def test_a_report_shows_nothing_empty_and_its_json_has_every_table():
    here = profile(*crossing_between(64, 256))
    sections = tables(here, derive(here))
    text = render_sections(sections, "table", terminal=False)
    assert "Not measured" not in text
    assert "all_reduce\n" not in text
    document = json.loads(render_sections(sections, "json"))
    assert list(document) == [
        "schema_version", "profile", "paths", "measurements", "excluded", "bands", "crossovers",
    ]  # fmt: skip


def test_several_dtypes_are_one_document_with_a_dtype_in_every_row():
    made = [profile(*crossing_between(64, 256), dtype=dtype) for dtype in ("bfloat16", "float16")]
    document = json.loads(
        render_sections([part for one in made for part in tables(one, derive(one))], "json")
    )
    for name in ("profile", "paths", "measurements", "bands", "crossovers"):
        assert {row["dtype"] for row in document[name]["rows"]} == {"bfloat16", "float16"}, name


def test_the_data_of_a_measurement_is_one_row_per_path_with_its_spread():
    here = profile(
        Sample(path=FUSED, num_tokens=16, hidden_size=2048, times_us=(4.0, 5.0, 6.0)),
        Sample(path=UNFUSED, num_tokens=16, hidden_size=2048, times_us=(8.0, 8.0, 8.0)),
    )
    fused, unfused = measurements(here).rows
    assert (fused["path"], fused["time_us"], fused["time_low_us"], fused["time_high_us"]) == (
        FUSED, 5.0, 4.0, 6.0,
    )  # fmt: skip
    assert (fused["chosen"], unfused["chosen"], unfused["rounds"]) == (True, False, 3)
    assert list(fused) == list(unfused)


def test_what_is_shown_as_saving_is_the_median_of_the_paired_differences():
    here = profile(
        Sample(path=FUSED, num_tokens=16, hidden_size=2048, times_us=(1.0, 5.0, 9.0)),
        Sample(path=UNFUSED, num_tokens=16, hidden_size=2048, times_us=(10.0, 6.0, 12.0)),
    )
    section = measurements(here)
    (row,) = section.records
    assert row["gain_us"] == 3.0  # of 9, 1, 3; the medians differ by 5
    assert "median over paired rounds" in section.notes[1]
    assert "not the difference of the medians" in section.notes[1]


def test_where_room_is_short_the_slowest_path_that_never_runs_goes_first():
    slow = PathRecord(name="gloo + rms_norm", provider="torch", fused=False)
    others = profile(*crossing_between(64, 256)).paths
    samples = (*crossing_between(64, 256), sample(slow.name, 64, 99.0))
    here = profile(*samples, paths=(slow, *others))
    drops = {c.key: c.drop for c in measurements(here).columns if c.key.startswith("median")}
    spread = {c.drop for c in measurements(here).columns if c.key == "gain_low_us"}
    assert (
        drops["median_us[gloo + rms_norm]"]
        > max(spread)
        > max(drops[f"median_us[{name}]"] for name in (FUSED, UNFUSED))
    ), "the two sides that are compared stay longest"
