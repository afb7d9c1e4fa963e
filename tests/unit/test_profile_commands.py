"""``fusewise profile``: what is called by which name, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fusewise.node import probe
from fusewise.profiles import history, store
from fusewise.profiles.schema import Profile
from tests import command_line
from tests.samples import FUSED, NODE, UNFUSED, profile_of

GLOO = "gloo + rms_norm"


pytestmark = pytest.mark.usefixtures("own_home")


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    return command_line.run("profile", *arguments, code=code)


def table(name: str, *arguments: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(run(*arguments, "-f", "json")[0])[name]["rows"]
    return rows


def here(shm_us: float, tokens: tuple[int, ...] = (1, 64), created: str = "2026-01-01") -> Profile:
    made = profile_of(
        {t: {"shm.one_shot": shm_us, GLOO: 8.0} for t in tokens},
        node=probe(2, device_type="cpu"),
        baseline=GLOO,
    )
    dated = made.provenance.model_copy(update={"created": created})
    return made.model_copy(update={"provenance": dated})


def written(profile: Profile, seconds: int) -> Path:
    """Kept as this node's, as if so many seconds after 2026-01-01."""
    path = store.save(profile)
    os.utime(path, (1767225600 + seconds, 1767225600 + seconds))
    return path


def test_show_is_the_same_in_both_places() -> None:
    long = run("show", "nvidia-h200-tp8")[0]
    assert long == command_line.run("show", "nvidia-h200-tp8")[0]
    assert "Decision" in long
    assert run("show", "tp8")[0] == long
    written(here(5.0), 0)
    now = run("show")[0]
    written(here(6.0), 60)
    assert now not in (run("show")[0], run("show", "fabric=shm")[0])
    assert now == run("show", "@")[0] == run("show", "fabric=shm@2026")[0]
    assert "nvidia-h200-tp8 is of 8 ranks" in run("show", "nvidia-h200-tp8", "--tp", "2", code=2)[1]


def test_the_list_has_every_shelf_and_names_what_is_broken(own_home: Path, tmp_path: Path) -> None:
    written(here(5.0), 0)
    written(here(6.0), 60)
    store.save(profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}}), tmp_path / "site")
    (own_home / "torn.json").write_text("{")
    rows = {str(row["name"]): row for row in table("profiles", "list")}
    own = here(5.0).file_name.removesuffix(".json")
    assert (rows[own]["level"], rows[own]["earlier"], rows[own]["samples"]) == ("user", 1, 4)
    assert rows["nvidia-h200-tp8"]["level"] == "packaged"
    assert rows["device=NVIDIA_H200,tp=2,dtype=bfloat16,fabric=nv18"]["level"] == "site"
    assert "not valid JSON" in str(rows["torn"]["problem"])
    assert "not valid JSON" in run("list")[0]
    (earlier,) = table("earlier", "list", own)
    assert earlier["date"] == "2026-01-01T00-00-00Z"
    assert "Nothing of it was replaced" in run("list", "tp8")[0]


def test_compare_by_date_by_name_by_part_and_by_file(tmp_path: Path) -> None:
    written(here(5.0), 0)
    written(here(6.0), 60)
    for words in (("@",), ("@2026-01-01",), ("dtype=bfloat16,fabric=shm@", "fabric=shm")):
        rows = table("times", "compare", *words)
        assert {row["verdict"] for row in rows} == {"slower"}
        assert {row["path"] for row in rows} == {"shm.one_shot"}
    file = tmp_path / "mine.json"
    file.write_text(here(4.0).to_json())
    assert {row["verdict"] for row in table("times", "compare", str(file), "@")} == {"slower"}
    assert len(table("times", "compare", "tp8", "nvidia-h200-tp8", "--all")) == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("compare", "h200"),
            "a part of several names: expected a file, or one of nvidia-h200-tp2",
        ),
        (("show", "nobody"), "no profile 'nobody': expected a file, or one of nvidia"),
        (("compare", "nobody"), "no profile 'nobody': expected a file, or one of nvidia"),
        (("compare", "tp8@2020"), "nvidia-h200-tp8 has no earlier version 2020: got none"),
        (("compare", "@"), "dtype=bfloat16,fabric=shm. Run `fusewise tune`"),
        (("compare", "tp8"), "fusewise tune"),
        (("list", "nobody"), "no profile 'nobody'"),
        (("restore",), "this node has no profile"),
        (("restore", "tp8"), "nvidia-h200-tp8 has no earlier version"),
        (("merge", "tp2", "tp8"), "profiles of two nodes do not merge: got world_size"),
        (("export",), "fusewise tune"),
    ],
)
def test_a_name_that_does_not_fit_says_what_would(arguments: tuple[str, ...], text: str) -> None:
    assert text in run(*arguments, code=5)[1]


def test_restore_puts_back_and_keeps_what_was_there() -> None:
    path = written(here(5.0), 0)
    written(here(6.0), 60)
    written(here(7.0), 120)
    run("restore")
    assert store.load(path) == here(6.0)
    run("restore", "fabric=shm@2026-01-01T00-00-00")
    assert store.load(path) == here(5.0)
    there = [store.load(file) for file in history.earlier(path)]
    assert all(profile in there for profile in (here(5.0), here(6.0), here(7.0)))


def test_a_broken_earlier_profile_is_not_put_back() -> None:
    path = written(here(5.0), 0)
    written(here(6.0), 60)
    history.earlier(path)[0].write_text("{")
    assert "not valid JSON" in run("restore", code=5)[1]
    assert store.load(path) == here(6.0)


def test_restore_passes_over_a_broken_version_and_says_so() -> None:
    path = written(here(5.0), 0)
    written(here(6.0), 60)
    written(here(7.0), 120)
    broken, whole = history.earlier(path)
    broken.write_text("{")
    assert f"passed over {broken.stem}: " in run("restore")[1]
    assert store.load(path) == here(5.0)
    assert broken.read_text() == "{"
    assert "not valid JSON" in run("restore", f"@{broken.stem}", code=5)[1]
    assert whole in history.earlier(path)


def test_merge_makes_one_of_two_whichever_is_named_first(tmp_path: Path) -> None:
    old, new = here(5.0), here(6.0, (64, 256), "2026-02-01")
    kept = written(here(9.0), 0)
    for name, profile in (("old", old), ("new", new)):
        (tmp_path / name).write_text(profile.to_json())
    for pair in (("old", "new"), ("new", "old")):
        run("merge", *(str(tmp_path / name) for name in pair))
        both = store.load(kept)
        assert [s.num_tokens for s in both.samples] == [1, 1, 64, 64, 256, 256]
        assert set(new.samples) < set(both.samples)
    assert here(9.0) in [store.load(file) for file in history.earlier(kept)]
    _, err = run(
        "merge", str(tmp_path / "old"), str(tmp_path / "new"), "--into", str(tmp_path / "d")
    )
    assert f"wrote {tmp_path / 'd'}" in err


def test_export_gives_the_file_itself_or_puts_it_where_all_may_read(tmp_path: Path) -> None:
    path = written(here(5.0), 0)
    assert run("export")[0] == path.read_text()
    assert run("export", "tp8")[0] == store.load("nvidia-h200-tp8").to_json()
    run("export", "--into", str(tmp_path / "site"))
    handed = tmp_path / "site" / path.name
    assert handed.read_bytes() == path.read_bytes()
    assert handed.stat().st_mode & 0o777 == 0o644
    assert handed.parent.stat().st_mode & 0o777 == 0o755
    path.unlink()
    found = store.find_profile(probe(2, device_type="cpu"), "bfloat16")
    assert (found.level, found.profile) == ("site profile", here(5.0))


def test_the_profile_named_by_a_node_of_another_kind_is_not_this_ones(own_home: Path) -> None:
    store.save(profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}}, node=NODE))
    assert "this node has no profile" in run("compare", "@", code=5)[1]
