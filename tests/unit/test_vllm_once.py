"""Decided once, agreed before vLLM builds anything: the order of things, and who never decides."""

from __future__ import annotations

import logging
import os
import sys
import types
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm import narrow, plugin, settle, takeover
from fusewise.engines.vllm.mark import Mark
from fusewise.profiles.store import Resolution
from tests.vllm_fakes import Rank, tp2_profile

CAP = Mark("cap", cap_mb=4.0, table=True, fuses=True)
BEFORE = (64, None, [100, 8192])


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
    monkeypatch.setattr("fusewise.engines.plugin.find_profile", lambda node, dtype: found)
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
