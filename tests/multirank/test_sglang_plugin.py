"""The plugin in SGLang's own loader, registry and fusion code, on two ranks that have to agree.

Two processes run every scenario (``tests/sglang_simulation.py`` says what is real in them). Skipped
where ``tests/sglang_sources.py`` has not fetched the sources.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.ranks import run_script
from tests.sglang_scenarios import HOME, ROOT, SCENARIOS, entry_points, home_with_a_profile
from tests.sglang_sources import RUN_AGAINST, WHEELS

KIB, MIB = 2**10, 2**20


@pytest.fixture(scope="module", params=RUN_AGAINST)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name → the two ranks' results of every scenario."""
    sources = WHEELS.unpacked(request.param)
    if sources is None:
        pytest.skip(f"SGLang {request.param} is not unpacked: python -m tests.sglang_sources")
    folder = tmp_path_factory.mktemp("sglang")
    home, empty = home_with_a_profile(folder / "home"), str(folder / "empty")
    asked = json.dumps(list(SCENARIOS.values())).replace(f'"{HOME}"', json.dumps(home))
    path = [entry_points(folder / "points"), str(sources), str(ROOT / "src"), str(ROOT)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEWISE_", "SGLANG_"))}
    environ |= {
        "PYTHONPATH": os.pathsep.join(path), "SGLANG_SOURCES": str(sources),
        "SGLANG_PLUGINS": "fusewise", "FUSEWISE_HOME": empty, "FUSEWISE_SITE_DIR": empty,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script, store = ROOT / "tests" / "sglang_simulation.py", str(folder / "store")

    def rank(number: int) -> list[dict[str, Any]]:
        printed = run_script(script, str(number), "2", store, stdin=asked, environ=environ)
        told: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
        return told

    with ThreadPoolExecutor() as pool:
        return dict(zip(SCENARIOS, zip(*pool.map(rank, (0, 1)), strict=True), strict=True))


def words(result: dict[str, Any]) -> str:
    return "\n".join(result["log"])


@pytest.mark.parametrize(
    ("name", "tokens", "cap", "line"),
    [
        ("as it comes", 36, 512 * KIB, "28M -> 512K, 2048 -> 36 tokens of 7168 (cap): SGLang"),
        ("hidden 4096", 64, 512 * KIB, "16M -> 512K, 2048 -> 64 tokens of 4096"),
        ("measured", 256, 1 * MIB, "8M -> 1M, 2048 -> 256 tokens of 2048 (cap): at 2M"),
        ("explicit", 512, 7 * MIB, "28M -> 7M, 2048 -> 512 tokens of 7168 (cap): set explicitly"),
        ("explicit, nothing fused", 0, KIB, "28M -> nothing fused, 2048 -> 0 tokens"),
        ("a draft first", 36, 512 * KIB, "28M -> 512K"),
        ("new version", 36, 512 * KIB, "28M -> 512K"),
        ("ranks differ", 36, 512 * KIB, "28M -> 512K"),
        ("broken profile", 36, 512 * KIB, "28M -> 512K"),
    ],
)
def test_all_ranks_bound_the_fusion_and_plain_flashinfer(
    outcome: Any, name: str, tokens: int, cap: int, line: str
) -> None:
    """One token more is asked about in each case, and not fused."""
    for rank in outcome[name]:
        assert rank["fuses_up_to"] == rank["plain_flashinfer_up_to"] == tokens
        assert rank["bounds"] == [tokens, cap, False]
    first, second = outcome[name]
    assert line in words(first)
    assert not [said for said in second["log"] if said.startswith("INFO")]


def test_the_pages_line_is_the_one_in_the_log(outcome: Any) -> None:
    page = (ROOT / "docs" / "sglang.md").read_text("utf-8")
    (shown,) = re.findall(r"^(fusewise: fusion cap .*)$", page, re.M)
    assert f"INFO {shown}" in outcome["as it comes"][0]["log"]


def test_the_hook_reaches_modules_that_imported_the_gate_by_name(outcome: Any) -> None:
    assert all(rank["hooked"] and rank["same_where_imported"] for rank in outcome["as it comes"])


def test_a_graph_with_a_symbolic_size_gives_the_same_answers(outcome: Any) -> None:
    traced = outcome["as it comes"][0]["traced"]
    assert traced == [True] * 2 + [False] * 9  # 1, 36 | 37 and more


@pytest.mark.parametrize("name", ["no multicast", "explicit, beyond", "mnnvl"])
def test_a_cap_that_stays_bounds_nothing(outcome: Any, name: str) -> None:
    for rank in outcome[name]:
        assert rank["bounds"] == [None, None, False]
        assert rank["fuses_up_to"] == rank["plain_flashinfer_up_to"] == 2048
    (line,) = [line for line in outcome[name][0]["log"] if line.startswith("INFO")]
    assert "stays 28M (cap)" in line
    assert ("mnnvl, not measured" in line) == (name == "mnnvl")


@pytest.mark.parametrize("name", ["off", "front end", "no fusion", "cutedsl", "no workspace"])
def test_silent_where_there_is_nothing_to_decide(outcome: Any, name: str) -> None:
    for rank in outcome[name]:
        assert rank["log"] == []
        assert rank["bounds"] == [None, None, False]
        assert rank["hooked"] == (name not in ("off", "front end"))
        assert rank["fuses_up_to"] == (2048 if name in ("off", "front end") else 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown mode", "rank 1: InputError: FUSEWISE_SGLANG: expected cap, full, off, got 'on'"),
        ("nonsense cap", "rank 1: InputError: FUSEWISE_CAP"),
        ("nonsense switch", "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2: expected true or 1"),
        ("another threshold", "expected 2048 tokens, got 512"),
        ("moved seam", "no_such_thing"),
        ("another unhooked it", "did not apply a hook: got"),
        ("other ranks", "other ranks than those of the tensor-parallel group"),
        ("mscclpp", "--enable-mscclpp"),
        ("six ranks", "expected 2, 4, 8, 16 GPUs of it, got 6"),
    ],
)
def test_one_line_on_each_rank_and_sglang_as_it_was(outcome: Any, name: str, said: str) -> None:
    most = SCENARIOS[name].get("threshold", 2048)
    for rank in outcome[name]:
        (line,) = rank["log"]
        assert line.startswith("WARNING fusewise leaves SGLang as it is")
        assert said in line
        assert rank["bounds"] == [None, None, False]
        assert rank["fuses_up_to"] == most


def test_an_older_version_registers_nothing(outcome: Any) -> None:
    for rank in outcome["old version"]:
        (line,) = rank["log"]
        assert "fusewise does nothing" in line and "0.5.20" in line
        assert not rank["hooked"]


def test_a_newer_version_is_taken_for_the_newest_known_and_said_so(outcome: Any) -> None:
    assert "SGLang 0.6.1 was not read" in words(outcome["new version"][0])


def test_a_rank_that_does_not_come_leaves_all_as_they_were(outcome: Any) -> None:
    waiting, off = outcome["one rank off"]
    assert "no answer from [1]" in words(waiting)
    assert waiting["bounds"] == off["bounds"] == [None, None, False]
    assert waiting["fuses_up_to"] == off["fuses_up_to"] == 2048


def test_rank_0s_variables_hold_where_ranks_differ_and_it_says_so(outcome: Any) -> None:
    assert "rank 1 has FUSEWISE_CAP='1M'" in words(outcome["ranks differ"][0])


def test_a_profile_that_cannot_be_used_is_named_and_passed_over(outcome: Any) -> None:
    assert "/nowhere/profile.json" in words(outcome["broken profile"][0])


ROUTED = {"256": "flashinfer", "512": "unfused", "1024": "unfused", "2048": "ours"}


@pytest.mark.parametrize("name", ["full", "full, profile on rank 0 only"])
def test_full_mode_routes_sglangs_fused_operator_by_the_plan(outcome: Any, name: str) -> None:
    for rank in outcome[name]:
        assert rank["bounds"] == [2048, 0, True]
        assert rank["fuses_up_to"] == 2048
        assert rank["plain_flashinfer_up_to"] == 0  # not what the plan's unfused paths were
        assert rank["routed"] == ROUTED
    assert "full mode on: hidden 2048" in words(outcome[name][0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("full, one cannot build", "no native kernel could be built: got native.one_shot: "
                                   "native.one_shot: build: rank 1: RuntimeError: no compiler"),
        ("full, another plan", "not all ranks could go ahead with full mode"),
    ],
)  # fmt: skip
def test_where_full_mode_fails_on_one_rank_the_narrow_cap_rules_on_all(
    outcome: Any, name: str, said: str
) -> None:
    for rank in outcome[name]:
        assert rank["bounds"] == [256, MIB, False]
        assert rank["fuses_up_to"] == 256
        assert "full mode is off, the cap rules" in words(rank)
        assert said in words(rank)


def test_full_mode_without_a_profile_is_cap_and_says_why(outcome: Any) -> None:
    """It is there for rank 1 alone: rank 0 decides."""
    first, second = outcome["full, profile gone"]
    assert first["bounds"] == second["bounds"]
    assert not first["bounds"][2]
    assert "full needs a profile of this node with a native kernel" in words(first)


def test_full_mode_is_cap_where_calls_run_on_two_streams(outcome: Any) -> None:
    for rank in outcome["full, two streams"]:
        assert rank["bounds"] == [256, MIB, False]
    assert "--enable-pdmux has two" in words(outcome["full, two streams"][0])


def test_importing_the_entry_point_imports_neither_sglang_nor_torch() -> None:
    code = (
        "import sys; import fusewise.engines.sglang.plugin as p; p.register(); "
        "print([m for m in ('torch', 'sglang', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
