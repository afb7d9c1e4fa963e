"""Workers agree before anything is set: on all ranks or on none, and nobody decides there."""

from __future__ import annotations

import logging
import os
import sys
import threading
import types
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm import narrow, plugin, settle, takeover
from fusewise.engines.vllm.mark import Mark
from fusewise.profiles.store import Resolution
from tests.groups import StoreRanks
from tests.vllm_fakes import MIB, tp2_profile

CAP = Mark("cap", cap_mb=4.0, table=True, fuses=True)
ALONE = replace(CAP, alone=True, endpoints=[100])
BEFORE = (64, None, [100, 8192])
ROW_BYTES = 4096


class Rank:
    """One worker's config and its process's table."""

    def __init__(self, mark: Mark | None, quantization: str | None = None) -> None:
        self.table: dict[int, float] = {2: 64}
        self.passes = SimpleNamespace(
            fuse_allreduce_rms=True, fi_allreduce_fusion_max_size_mb=None,
            flashinfer_max_size=lambda world_size: int(self.table[world_size] * MIB),
        )  # fmt: skip
        self.compilation = SimpleNamespace(
            pass_config=self.passes, compile_ranges_endpoints=[100, 8192]
        )
        self.config: Any = SimpleNamespace(
            compilation_config=self.compilation,
            parallel_config=SimpleNamespace(
                tensor_parallel_size=2, distributed_executor_backend="mp",
                disable_custom_all_reduce=False,
            ),
            model_config=SimpleNamespace(
                dtype=torch.bfloat16, get_hidden_size=lambda: 2048, quantization=quantization
            ),
            _set_compile_ranges=self._ranges,
        )  # fmt: skip
        if mark is not None:
            marks.write(self.config, mark)

    def _ranges(self) -> None:
        tokens = int((self.passes.fi_allreduce_fusion_max_size_mb or 64) * MIB) // ROW_BYTES
        kept = self.compilation.compile_ranges_endpoints or []
        self.compilation.compile_ranges_endpoints = sorted([*kept, tokens, 8192])

    @property
    def state(self) -> tuple[float, float | None, list[int]]:
        """What stands in table, field and compile ranges."""
        field_mb = self.passes.fi_allreduce_fusion_max_size_mb
        return self.table[2], field_mb, self.compilation.compile_ranges_endpoints


class Workers(StoreRanks):
    """Ranks as threads; each has a table, as each worker's process has."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *given: Mark, timeout_s: float = 20.0
    ) -> None:
        super().__init__(len(given), timeout_s)
        self.workers = [Rank(mark) for mark in given]
        self._here = threading.local()
        self.blind: set[int] = set()
        monkeypatch.setattr("fusewise.ranks.group.Group", lambda group, timeout_s: group)
        monkeypatch.setattr(settle, "_lowered", {})
        monkeypatch.setattr(settle, "_row", self._row)

    def _row(self) -> tuple[int, dict[int, float]]:
        if self._here.rank in self.blind:
            raise ImportError("no table")
        return self._here.rank, self.workers[self._here.rank].table

    def settle(self, *ranks: int) -> None:
        self.come(*ranks, ask=self._ask)

    def _ask(self, group: Any) -> None:
        self._here.rank = group.rank
        config = self.workers[group.rank].config
        mark = marks.read(config)
        assert mark is not None
        settle.settled(group, config, mark)

    @property
    def states(self) -> list[tuple[float, float | None, list[int]]]:
        return [worker.state for worker in self.workers]


def test_all_lower_their_tables_together(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch, CAP, CAP)
    workers.settle(0, 1)
    assert workers.ended == {0: "went ahead", 1: "went ahead"}
    assert workers.states == [(4, None, [100, 8192])] * 2  # the field came with the config


def test_ranks_that_built_their_own_configs_set_the_cap_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(monkeypatch, ALONE, ALONE)
    workers.settle(0, 1)
    assert workers.states == [(4, 4.0, [100, 1024, 8192])] * 2


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(ALONE, cap_mb=8.0), "rank 1 says cap, 8 MB, pass and table"),
        (Mark(alone=True), "rank 1 says nothing"),
        (replace(ALONE, mode="full", wide_mb=16.0), "rank 1 says full, 4 MB, then 16 MB"),
        (Mark(alone=True, fault="the node could not be probed"), "could not be probed"),
    ],
)
def test_ranks_of_different_opinion_all_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch, other: Mark, words: str
) -> None:
    workers = Workers(monkeypatch, ALONE, other)
    workers.settle(0, 1)
    assert workers.states == [BEFORE] * 2
    assert all(words in told for told in workers.ended.values())


def test_a_rank_without_the_plugin_leaves_all_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch, CAP, CAP, timeout_s=0.2)
    workers.settle(0)
    assert "no answer from ranks [1]" in workers.ended[0]
    workers.settle(1)  # it was only late
    assert workers.ended[1] == workers.ended[0]
    assert workers.states == [BEFORE] * 2


def test_a_table_one_rank_cannot_find_stays_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch, CAP, CAP)
    workers.blind.add(1)
    workers.settle(0, 1)
    assert workers.states == [BEFORE] * 2
    assert "rank 1: ImportError: no table" in workers.ended[0]


def test_users_caps_on_all_ranks_are_nothing_to_talk_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(monkeypatch, Mark(alone=True), Mark(alone=True))
    workers.settle(0, 1)
    assert workers.ended == {0: "went ahead", 1: "went ahead"}
    assert workers.states == [BEFORE] * 2


def test_the_next_engine_of_a_process_finds_vllms_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {90: {2: 64.0, 8: 0.5}}
    monkeypatch.setattr(settle, "resolve", lambda seam: table)
    monkeypatch.setattr(settle, "_lowered", {})
    for cap_mb in (8.0, 4.0):
        settle._lower((90, table[90]), 2, cap_mb)
    assert table == {90: {2: 4.0, 8: 0.5}}
    settle.restore_table()
    assert table == {90: {2: 64.0, 8: 0.5}}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``vllm.config.vllm`` with a current config to set."""
    current = SimpleNamespace(config=None)
    module: Any = types.ModuleType("vllm.config.vllm")
    module.get_current_vllm_config_or_none = lambda: current.config
    for name in ("vllm", "vllm.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return current


def test_a_config_nobody_marked_is_never_decided_about_in_a_worker(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A front end without the plugin; its workers rebuild their config when they load a model."""
    monkeypatch.setattr(narrow, "_decided", lambda config, switch: pytest.fail("decided"))
    vllm.config = Rank(None).config
    assert settle.agree("group") is None
    narrow.decide_once(vllm.config)
    assert marks.read(vllm.config) == Mark()


@pytest.mark.parametrize(
    ("mark", "asks"),
    [
        (Mark(), False),
        (replace(CAP, table=False), False),
        (CAP, True),
        (replace(CAP, mode="full", table=False), True),
        (Mark(alone=True), True),
    ],
)
def test_ranks_meet_only_where_there_is_something_to_settle(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, mark: Mark, asks: bool
) -> None:
    vllm.config = Rank(mark).config
    monkeypatch.setattr(settle, "settled", lambda group, config, mark: mark)
    assert (settle.agree("group") is not None) == asks


def _communicator(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> list[str]:
    """What happens around one communicator's construction, in order."""
    order: list[str] = []
    steps = {
        "release": lambda: order.append("release"),
        "agree": lambda group: order.append(f"agree over {group}") or ("config", CAP),
        "install": lambda communicator, config, mark: order.append("install"),
    } | changes
    monkeypatch.setattr(takeover, "release", steps["release"])
    monkeypatch.setattr(settle, "agree", steps["agree"])
    monkeypatch.setattr(takeover, "install", steps["install"])

    def init(self: Any, cpu_group: Any, device: Any = None, device_group: Any = None,
             unique_name: str = "") -> None:  # fmt: skip
        order.append("vllm")

    plugin._around_communicator_init(
        init, object(), cpu_group="gloo", device_group="nccl", unique_name=name
    )
    return order


def test_ranks_agree_before_vllm_builds_its_all_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _communicator(monkeypatch, "tp:0") == ["release", "agree over nccl", "vllm", "install"]


@pytest.mark.parametrize("name", ["ep:0", "etp:0", "dp:0", ""])
def test_other_groups_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert _communicator(monkeypatch, name) == ["vllm"]


def test_ranks_that_do_not_agree_build_vllms_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(group: Any) -> None:
        raise ImportError("another opinion")

    with caplog.at_level(logging.WARNING, "vllm.plugins.fusewise"):
        assert _communicator(monkeypatch, "tp:0", agree=refuses) == ["release", "vllm"]
    assert "as it is: ImportError: another opinion" in caplog.text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "FUSEWISE_"),
        ("", "FUSEWISE_"),
        ("A_, B_", "A_, B_,FUSEWISE_"),
        ("A_,FUSEWISE_", "A_,FUSEWISE_"),
    ],
)
def test_rays_actors_get_our_variables(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    plugin._tell_ray()
    plugin._tell_ray()
    assert os.environ[name] == after


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two H200s with vLLM 0.22.1, and a profile in which ours win."""
    profile = tp2_profile(native=True)
    here = profile.fingerprint.model_copy(update={"flashinfer": "0.6.11"})
    found = Resolution(profile, "user's profile", "a test")
    monkeypatch.setattr(narrow, "probe_apart", lambda world_size: here)
    monkeypatch.setattr(narrow, "torch_multicast_apart", lambda world_size: False)
    monkeypatch.setattr(narrow, "find_profile", lambda node, dtype: found)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.22.1")
    monkeypatch.setenv("FUSEWISE_VLLM", "full")


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize(("quantization", "wide"), [(None, True), ("fp8", False)])
def test_full_mode_does_not_widen_what_a_quantised_model_fuses(
    quantization: str | None, wide: bool
) -> None:
    """Its patterns with quantisation are FlashInfer's at every size that is fused."""
    worker = Rank(None, quantization)
    narrow.decide_once(worker.config)
    mark = marks.read(worker.config)
    assert mark is not None
    assert mark.mode == "full"
    assert (mark.wide_mb is not None) == wide
    assert worker.passes.fi_allreduce_fusion_max_size_mb == mark.cap_mb


class ExecutorWithExternalLauncher:
    """vLLM's, which may be given as a class."""


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("backend", ["external_launcher", ExecutorWithExternalLauncher])
def test_a_rank_for_itself_only_proposes(backend: Any) -> None:
    worker = Rank(None)
    worker.config.parallel_config.distributed_executor_backend = backend
    narrow.decide_once(worker.config)
    mark = marks.read(worker.config)
    assert mark is not None
    assert (mark.alone, mark.endpoints) == (True, [100, 8192])
    assert worker.state == BEFORE
