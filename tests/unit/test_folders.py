"""The folders that variables name: where they are, and whether what lies there is to be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusewise.backends.native.cuda.cubin_cache import default_folder
from fusewise.commands import measuring
from fusewise.profiles import store
from tests.samples import FUSED, NODE, UNFUSED, profile_of

GOOD = profile_of({1: {FUSED: 5.0, UNFUSED: 8.0}})


def test_every_path_of_a_variable_may_begin_with_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("HOME", "SITE_DIR", "CACHE_DIR", "PROFILE", "MEASURING_LOCK")
    environ = {f"FUSEWISE_{name}": f"~/{name}" for name in names}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(measuring, "busy", list)
    assert store.user_dir(environ) == tmp_path / "HOME" / "profiles"
    assert store.site_dir(environ) == tmp_path / "SITE_DIR"
    assert default_folder() == tmp_path / "CACHE_DIR" / "cubins"
    (tmp_path / "PROFILE").write_text(GOOD.to_json())
    assert store.find_profile(NODE, "bfloat16", environ=environ).profile == GOOD
    with measuring.alone():
        assert (tmp_path / "MEASURING_LOCK").exists()
    assert store.site_dir({"FUSEWISE_SITE_DIR": "~nobody.there"}) == Path("~nobody.there")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_not_searched(tmp_path: Path, mode: int) -> None:
    environ = {"FUSEWISE_HOME": str(tmp_path / "home"), "FUSEWISE_SITE_DIR": str(tmp_path / "site")}
    path = store.save(GOOD, store.user_dir(environ))
    store.save(GOOD, store.site_dir(environ))
    for readable in (0o700, 0o755):
        path.parent.chmod(readable)
        assert store.find_profile(NODE, "bfloat16", environ=environ).level == "user profile"
    path.parent.chmod(mode)
    found = store.find_profile(NODE, "bfloat16", environ=environ)
    assert found.level == "site profile"
    (note,) = (note for note in found.notes if "passed over" in note)
    assert f"has mode {mode:o}: others may write there" in note and "chmod go-w" in note
    named = store.find_profile(NODE, "bfloat16", environ=environ, argument=str(path))
    assert named.profile == GOOD
    assert store.find_profile(NODE, "float16", environ=environ).notes == ()
