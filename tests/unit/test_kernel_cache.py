"""Cubins on disk: found again, and never trusted when somebody else may have written them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fusewise.backends.native.cuda import build, cubin_cache
from fusewise.backends.native.cuda.cubin_cache import CubinCache
from fusewise.backends.native.instance import Instance

CODE = b"\x7fELF some machine code"
KEY = "0" * 64


@pytest.fixture
def cache(tmp_path: Path) -> CubinCache:
    made = CubinCache(tmp_path / "cubins")
    made.put(KEY, CODE)
    return made


def test_what_was_stored_is_found_by_another_process(cache: CubinCache) -> None:
    assert CubinCache(cache.folder).get(KEY) == CODE
    assert cache.get("1" * 64) is None
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEY}.cubin"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_counts_as_absent(cache: CubinCache, damage: str) -> None:
    path = cache.folder / f"{KEY}.cubin"
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes({"flip": flipped, "truncate": content[:-1], "empty": b""}[damage])
    assert cache.get(KEY) is None
    cache.put(KEY, CODE)
    assert cache.get(KEY) == CODE


@pytest.mark.parametrize(
    ("mode", "found"), [(0o600, True), (0o644, True), (0o620, False), (0o602, False)]
)
def test_a_file_others_may_write_counts_as_absent(
    cache: CubinCache, mode: int, found: bool
) -> None:
    (cache.folder / f"{KEY}.cubin").chmod(mode)
    assert (cache.get(KEY) == CODE) is found


def test_a_linked_file_counts_as_absent(cache: CubinCache, tmp_path: Path) -> None:
    path = cache.folder / f"{KEY}.cubin"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.get(KEY) is None


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_an_open_folder_is_not_used(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "cubins"
    folder.mkdir()
    folder.chmod(mode)
    cache = CubinCache(folder)
    with pytest.warns(RuntimeWarning, match=f"has mode {mode:o}, not 700"):
        cache.put(KEY, CODE)
    assert cache.get(KEY) is None
    assert not list(folder.iterdir())


def test_a_linked_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "cubins").symlink_to(tmp_path / "real")
    with pytest.warns(RuntimeWarning, match="is a symbolic link"):
        CubinCache(tmp_path / "cubins").put(KEY, CODE)
    assert not list((tmp_path / "real").iterdir())


def test_another_users_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CubinCache(tmp_path / "cubins")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.warns(RuntimeWarning, match=f"belongs to user {owner}"):
        assert cache.get(KEY) is None


def test_a_folder_that_cannot_be_made_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be made"):
        assert CubinCache(tmp_path / "file" / "cubins").get(KEY) is None


def test_a_full_disk_costs_a_warning(cache: CubinCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        cache.put("2" * 64, CODE)
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEY}.cubin"]


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEWISE_CACHE_DIR", str(tmp_path))
    assert cubin_cache.default_folder() == tmp_path / "cubins"
    monkeypatch.delenv("FUSEWISE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cubin_cache.default_folder() == tmp_path / "xdg" / "fusewise" / "cubins"


def test_compiled_once_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def fake(instance: Instance, sm: int) -> bytes:
        compiled.append(sm)
        return CODE

    monkeypatch.setattr(build, "compile_instance", fake)
    monkeypatch.setattr(build, "nvrtc_version", lambda: "13.0")
    instance = Instance("one_shot", "bfloat16", 2)
    for _ in range(2):
        assert build.cubin(instance, 90, CubinCache(tmp_path / "cubins")) == CODE
    assert compiled == [90]
    build.cubin(instance, 100, CubinCache(tmp_path / "cubins"))
    assert compiled == [90, 100]


def test_the_key_changes_with_everything_that_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvrtc_version", lambda: "13.0")
    instance = Instance("one_shot", "bfloat16", 2)
    keys = {build.cubin_key(instance, 90), build.cubin_key(instance, 100)}
    changes = [{"dtype": "float16"}, {"world_size": 4}, {"vectors": 2}, {"blocks": 2},
               {"output": "kSum"}, {"early_trigger": True}, {"max_threads": 512},
               {"min_blocks": 2}, {"kernel": "two_shot"}]  # fmt: skip
    keys |= {build.cubin_key(replace(instance, **change), 90) for change in changes}
    monkeypatch.setattr(build, "nvrtc_version", lambda: "13.1")
    keys.add(build.cubin_key(instance, 90))
    monkeypatch.setattr(build, "kernels_digest", lambda: "another source")
    keys.add(build.cubin_key(instance, 90))
    assert len(keys) == 2 + len(changes) + 2


def test_without_cuda_core_the_reason_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    reason = build.missing_compiler()
    assert reason is not None and 'pip install "fusewise[cuda]"' in reason


def test_what_lies_in_a_folder_that_cannot_be_written_is_found(
    cache: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.folder.chmod(0o500)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root would not be told
    assert CubinCache(cache.folder).get(KEY) == CODE
