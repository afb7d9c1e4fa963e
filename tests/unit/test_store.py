"""Where profiles are kept: found by precedence, never lost, never half written."""

from __future__ import annotations

import fcntl
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from fusewise.errors import InputError, ProfileError, StaleProfileError, UnavailableError
from fusewise.node import HARDWARE, SOFTWARE, Fingerprint
from fusewise.profiles import history, private, store
from tests.samples import FUSED, NODE, UNFUSED, profile_of

GOOD = profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}})
OTHER = {
    "device_type": "cpu", "device": "NVIDIA H100", "sm": 100, "world_size": 4, "nodes": 2,
    "fabric": "pcie", "multicast": True, "driver": "1", "cuda": "1", "nccl": "1", "torch": "1",
    "flashinfer": None,
}  # fmt: skip


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"FUSEWISE_HOME": str(tmp_path / "home"), "FUSEWISE_SITE_DIR": str(tmp_path / "site")}


def place(environ: dict[str, str], where: str = "user") -> Path:
    folder = store.user_dir(environ) if where == "user" else store.site_dir(environ)
    return store.save(GOOD, folder)


def test_precedence_from_argument_to_nothing(environ: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(GOOD.to_json())

    def level(**named: object) -> str:
        return store.find_profile(NODE, "bfloat16", environ=environ, **named).level  # type: ignore[arg-type]

    assert level() == "packaged profile"  # of such a node, if of other versions
    place(environ, "site")
    assert level() == "site profile"
    place(environ)
    assert level() == "user profile"
    environ["FUSEWISE_PROFILE"] = str(file)
    assert level() == "environment"
    assert level(argument=str(file)) == "argument"
    assert level(argument=GOOD) == "argument"


def test_another_dtype_is_not_found_by_searching(environ: dict[str, str]) -> None:
    place(environ)
    assert store.find_profile(NODE, "float16", environ=environ).profile is None


def elsewhere(environ: dict[str, str], field: str) -> Fingerprint:
    """A node that differs in one field from the one whose profile is stored under its name."""
    path = place(environ)
    here = NODE.model_copy(update={field: OTHER[field]})
    # The file may carry the asked name although its content is of another node.
    path.rename(path.with_name(store.profile_file_name(here, "bfloat16")))
    return here


@pytest.mark.parametrize("field", HARDWARE)
def test_a_found_profile_of_other_hardware_is_stale(field: str, environ: dict[str, str]) -> None:
    found = store.find_profile(elsewhere(environ, field), "bfloat16", environ=environ)
    assert found.profile is None
    assert any(f"{field}: {getattr(NODE, field)} in the profile" in note for note in found.notes)
    assert any("fusewise tune" in note for note in found.notes)


@pytest.mark.parametrize("field", SOFTWARE)
def test_other_versions_do_not_silence_a_profile_unless_asked(
    field: str, environ: dict[str, str]
) -> None:
    here = elsewhere(environ, field)
    found = store.find_profile(here, "bfloat16", environ=environ)
    assert (found.profile, found.level) == (GOOD, "user profile")
    (note,) = found.notes
    assert f"applies although {field}: {getattr(NODE, field)} in the profile" in note
    for how in ({"strict": True}, {"environ": environ | {"FUSEWISE_STRICT": "1"}}):
        strict = store.find_profile(here, "bfloat16", **({"environ": environ} | how))  # type: ignore[arg-type]
        assert strict.profile is None
        assert "is stale" in strict.notes[0]


def test_nonsense_in_the_variable_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(InputError, match="FUSEWISE_STRICT: expected 0 or 1, got 'yes'"):
        store.find_profile(NODE, "bfloat16", environ=environ | {"FUSEWISE_STRICT": "yes"})


@pytest.mark.parametrize("measured_with", ["0123", None])
def test_our_kernels_samples_count_only_for_their_sources(
    measured_with: str | None, environ: dict[str, str]
) -> None:
    ours = profile_of({1: {FUSED: 5.0, UNFUSED: 8.0, "native.one_shot": 3.0}})
    mark = NODE.model_copy(update={"kernels": measured_with})
    ours = ours.model_copy(update={"fingerprint": mark})
    store.save(ours, store.user_dir(environ))
    same = store.find_profile(mark, "bfloat16", environ=environ)
    assert same.profile == ours
    changed = store.find_profile(
        NODE.model_copy(update={"kernels": "89ab"}), "bfloat16", environ=environ
    )
    assert changed.profile is not None
    assert {sample.path for sample in changed.profile.samples} == {FUSED, UNFUSED}
    assert "native.one_shot left out" in changed.notes[0]


def test_an_explicit_profile_of_other_hardware_is_refused(environ: dict[str, str]) -> None:
    here = NODE.model_copy(update={"world_size": 8})
    with pytest.raises(StaleProfileError, match="world_size: 2 in the profile, 8 here"):
        store.find_profile(here, "bfloat16", argument=GOOD, environ=environ)


def test_an_explicit_profile_of_other_software_is_used_and_said(environ: dict[str, str]) -> None:
    here = NODE.model_copy(update={"torch": "9"})
    found = store.find_profile(here, "bfloat16", argument=GOOD, environ=environ)
    assert found.profile is GOOD
    assert "torch: 2.11.0 in the profile, 9 here" in found.notes[0]


def test_a_broken_profile_found_by_searching_does_not_stop_serving(
    environ: dict[str, str],
) -> None:
    place(environ, "site")
    place(environ).write_text("{")
    found = store.find_profile(NODE, "bfloat16", environ=environ)
    assert found.level == "site profile"
    assert "not valid JSON" in found.notes[0]


@pytest.mark.parametrize("kind", ["missing", "symlink", "directory", "fifo", "binary"])
def test_what_is_no_regular_profile_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    target = tmp_path / "real.json"
    target.write_text(GOOD.to_json())
    if kind == "symlink":
        path.symlink_to(target)
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"p\.json"):
        store.load(path)
    assert store.load(target) == GOOD


def test_saving_is_private_atomic_and_refuses_a_symlink(environ: dict[str, str]) -> None:
    path = place(environ)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".writing")] == []
    moved = path.with_name("elsewhere.json")
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(UnavailableError, match="symbolic link"):
        store.save(GOOD, path.parent)
    assert store.load(moved) == GOOD


def test_a_replaced_profile_is_kept_in_the_history(environ: dict[str, str]) -> None:
    path = place(environ)
    others = [profile_of({tokens: {FUSED: 5.0, UNFUSED: 8.0}}) for tokens in (7, 8)]
    for one in others:
        store.save(one, path.parent)
    assert store.load(path) == others[1]
    assert [store.load(kept) for kept in history.earlier(path)] == [others[0], GOOD]
    history.restore(path, history.earlier(path)[1])
    assert store.load(path) == GOOD
    assert store.load(history.earlier(path)[0]) == others[1], "what was there is kept too"


def test_the_history_has_an_end(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "KEPT", 12)
    path = place(environ)
    for _ in range(14):
        store.save(GOOD, path.parent)
    kept = history.earlier(path)
    assert len(kept) == 12
    numbers = [
        int(path.stem.partition("_")[2] or 1)
        for path in kept
        if path.stem[:19] == kept[0].stem[:19]
    ]
    assert numbers == sorted(numbers, reverse=True), "the newest stay, by number, not by spelling"


def test_a_narrow_tune_extends_what_is_there(environ: dict[str, str]) -> None:
    path = place(environ)
    narrow = profile_of({1: {FUSED: 4.0, UNFUSED: 7.0}, 64: {FUSED: 5.0, UNFUSED: 8.0}})
    assert store.extend(narrow, path.parent)[0] == path
    wide = store.load(path)
    assert {s.num_tokens for s in wide.samples} == {1, 64}
    assert next(s for s in wide.samples if s.num_tokens == 1) == narrow.samples[0], "the newer one"
    assert wide.provenance.extends == GOOD.provenance.created


@pytest.mark.parametrize("kind", ["other versions", "broken"])
def test_a_profile_that_cannot_be_extended_goes_to_the_history(
    kind: str, environ: dict[str, str]
) -> None:
    path = place(environ)
    if kind == "broken":
        path.write_text("{")
    here = GOOD.model_copy(update={"fingerprint": NODE.model_copy(update={"torch": "9"})})
    narrow = here if kind == "other versions" else GOOD
    assert store.extend(narrow, path.parent)[1] == narrow
    assert store.load(path) == narrow
    assert len(history.earlier(path)) == 1


def test_a_full_disk_is_an_error_and_leaves_the_old_profile_whole(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(environ)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private.os, "fsync", full)
    with pytest.raises(UnavailableError, match="No space left"):
        store.save(profile_of({7: {FUSED: 5.0, UNFUSED: 8.0}}), path.parent)
    assert store.load(path) == GOOD
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".writing")] == []


def test_a_directory_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UnavailableError, match="has mode 777"):
        store.save(GOOD, folder)


def test_a_held_lock_is_waited_for_and_then_named(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(environ)
    before = path.read_text()
    monkeypatch.setattr(history, "_LOCK_TIMEOUT_S", 0.1)
    with (path.parent / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="has held the lock"):
            store.save(GOOD, path.parent)
    assert path.read_text() == before


def _write_many(folder: str, tokens: int) -> None:
    profile = profile_of({tokens: {FUSED: 5.0, UNFUSED: 8.0}})
    for _ in range(20):
        store.save(profile, Path(folder))


def test_two_writers_leave_one_whole_profile(environ: dict[str, str]) -> None:
    folder = store.user_dir(environ)
    context = get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(folder), t)) for t in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    (path,) = folder.glob("device=*.json")
    assert store.load(path).samples[0].num_tokens in (1, 2)


def test_packaged_profiles_are_all_valid_and_found_by_name() -> None:
    assert "nvidia-h200-tp8" in store.packaged_names()
    for name in store.packaged_names():
        assert store.load(name).provenance.origin == "published"
    with pytest.raises(ProfileError, match="nvidia-h200-tp8"):
        store.load("nvidia-h2000")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.private_directory(tmp_path / "profiles")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root would not be told
    with pytest.raises(UnavailableError, match=r"cannot be written.*--into"):
        history.private_directory(tmp_path / "profiles")
