"""Runs vLLM's own config code without a GPU, scenario by scenario; one process per version.

Real: the wheel's Python sources, vLLM's plugin loader, ``VllmConfig`` with its whole construction,
``PassConfig``, the fusion table, FlashInfer's plain all-reduce reading it. Simulated: the GPU
(a subclass of vLLM's CUDA platform that answers capability and count), our node probe, and the
imports of ``vllm_absent.py``, which nothing under test uses: vLLM's compiled parts, its executors
and serving libraries that are not installed here.

Usage: ``python vllm_simulation.py`` with the sources on ``PYTHONPATH`` and a JSON list of scenarios
on stdin; the last line printed is a JSON list of results. See ``Scenario`` for the fields.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import pickle
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from vllm_absent import OPERATORS, Absent  # beside this script


@dataclass
class Scenario:
    """One start of vLLM.

    ``field_mb``: the user's own cap. ``fuse``: the pass, None as vLLM has it. ``probe_fails``: our
    probe raises, the first time only where the config is ``rebuilt``. ``torch_multicast``: as torch
    sees it, where NCCL's switch says otherwise.
    """

    environ: dict[str, str] = field(default_factory=dict)
    sm: int = 90
    world_size: int = 8
    multicast: bool = True
    torch_multicast: bool | None = None
    fuse: bool | None = None
    backend: str = "mp"
    rebuilt: bool = False
    nodes: int = 1
    hidden_size: int = 2048
    max_tokens: int = 8192
    field_mb: float | None = None
    flashinfer: bool = True
    loads: int = 1
    version: str | None = None
    live_cap_mb: float | None = None
    probe_fails: bool = False
    profile: str | None = None
    moved: str | None = None


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


NODE = SimpleNamespace(sm=90, count=8)


def prepare() -> None:
    """Imports vLLM's config with a Hopper or Blackwell platform that needs no driver."""
    import torch

    sys.meta_path.insert(0, Absent())
    for operator in OPERATORS:
        setattr(torch.ops._C, operator, mock.MagicMock(name=operator))
    import vllm.platforms as platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Simulated(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(NODE.sm // 10, NODE.sm % 10)

        @classmethod
        def device_count(cls) -> int:
            return int(NODE.count)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 141 * 2**30

    platforms._current_platform = Simulated()
    import vllm.config  # noqa: F401


def run(scenario: Scenario) -> dict[str, Any]:
    """The config vLLM ends up with, what our log says, and what a worker would read."""
    import vllm.plugins
    from vllm.config.vllm import VllmConfig
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

    NODE.sm, NODE.count = scenario.sm, max(8, scenario.world_size)
    places = [(VllmConfig, "_set_compile_ranges"), (CudaCommunicator, "__init__")]
    originals = [getattr(owner, name) for owner, name in places]
    lines = _Lines()
    log = logging.getLogger("vllm.plugins.fusewise")
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        with mock.patch.dict(os.environ, scenario.environ), _pretences(scenario):
            for _ in range(scenario.loads):
                vllm.plugins.plugins_loaded = False
                vllm.plugins.load_general_plugins()
            depth = _wrappers(VllmConfig._set_compile_ranges)
            result = _configure(scenario)
    finally:
        log.removeHandler(lines)
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
    return {**result, "wrappers": depth, "log": lines.lines}


def _wrappers(function: Any) -> int:
    depth = 0
    while hasattr(function, "__wrapped__"):
        function, depth = function.__wrapped__, depth + 1
    return depth


def _pretences(scenario: Scenario) -> Any:
    """What stands between the plugin and this machine."""
    import contextlib

    from fusewise.engines.vllm import narrow as vllm_cap
    from fusewise.engines.vllm import seams as vllm_seams
    from fusewise.errors import UnavailableError
    from fusewise.node import Fingerprint

    probes: list[int] = []

    def probe(world_size: int) -> Fingerprint:
        probes.append(world_size)
        if scenario.probe_fails and not (scenario.rebuilt and len(probes) > 1):
            raise UnavailableError("the node could not be probed", got="a test")
        return Fingerprint(
            device_type="cuda", device="NVIDIA H200", sm=scenario.sm, world_size=world_size,
            nodes=scenario.nodes, fabric="nv18", multicast=scenario.multicast,
            flashinfer="0.6.11.post2" if scenario.flashinfer else None,
        )  # fmt: skip

    real = importlib.metadata.version

    def version(name: str) -> str:
        return scenario.version if name == "vllm" and scenario.version else real(name)

    stack = contextlib.ExitStack()
    sees = scenario.multicast if scenario.torch_multicast is None else scenario.torch_multicast
    stack.enter_context(mock.patch.object(vllm_cap, "probe_apart", probe))
    stack.enter_context(mock.patch.object(vllm_cap, "torch_multicast_apart", lambda size: sees))
    stack.enter_context(mock.patch.object(importlib.metadata, "version", version))
    has = mock.patch("vllm.utils.flashinfer.has_flashinfer", lambda: scenario.flashinfer)
    stack.enter_context(has)
    if scenario.moved:
        kept = (*vllm_seams.CONFIG_SEAMS, vllm_seams.Seam("a test", "vllm", scenario.moved))
        stack.enter_context(mock.patch.object(vllm_seams, "CONFIG_SEAMS", kept))
    return stack


def _configure(scenario: Scenario) -> dict[str, Any]:
    from vllm.compilation.passes.fusion import allreduce_rms_fusion
    from vllm.config import CompilationConfig, ParallelConfig, VllmConfig
    from vllm.config.compilation import PassConfig
    from vllm.config.utils import is_init_field

    from fusewise.engines.vllm import settle

    table = allreduce_rms_fusion.FI_ALLREDUCE_FUSION_MAX_SIZE_MB
    kept = {sm: dict(row) for sm, row in table.items()}
    if scenario.live_cap_mb is not None:
        table[scenario.sm][scenario.world_size] = scenario.live_cap_mb
    try:
        config = VllmConfig(
            parallel_config=ParallelConfig(
                tensor_parallel_size=scenario.world_size,
                distributed_executor_backend=scenario.backend,
            ),
            compilation_config=CompilationConfig(
                pass_config=PassConfig(
                    fi_allreduce_fusion_max_size_mb=scenario.field_mb,
                    **({} if scenario.fuse is None else {"fuse_allreduce_rms": scenario.fuse}),
                )
            ),
        )
        if scenario.rebuilt:  # vllm.config.utils.replace, which wants a model, without one
            old = vars(config).items()
            config = VllmConfig(
                **{k: v for k, v in old if v is not None and is_init_field(VllmConfig, k)}
            )
        # VllmConfig was built whole, without a model: building a ModelConfig needs the model's
        # code. What follows is vLLM's own last step once more, with a model's two facts.
        _give_model(config, scenario)
        config._set_compile_ranges()
        return _facts(config, scenario, table)
    finally:
        settle.restore_table()
        table.clear()
        table.update(kept)


def _give_model(config: Any, scenario: Scenario) -> None:
    import torch

    config.model_config = SimpleNamespace(
        dtype=torch.bfloat16, get_hidden_size=lambda: scenario.hidden_size
    )
    config.scheduler_config.max_num_batched_tokens = scenario.max_tokens
    config.compilation_config.compile_ranges_endpoints = None


def _facts(config: Any, scenario: Scenario, table: Any) -> dict[str, Any]:
    from fusewise.engines.vllm import seams as vllm_seams

    passes = config.compilation_config.pass_config
    shipped = pickle.loads(pickle.dumps(passes))  # as vLLM ships it to its workers
    mark = getattr(shipped, vllm_seams.MARK, None)
    facts = {
        "field_mb": passes.fi_allreduce_fusion_max_size_mb,
        "cap_bytes": passes.flashinfer_max_size(scenario.world_size),
        "fuses": bool(passes.fuse_allreduce_rms),
        "endpoints": config.compilation_config.compile_ranges_endpoints,
        "mark": mark if mark and mark["mode"] != "none" else None,
        "marked": mark is not None,
        "hash_is_the_fields": passes.compute_hash() == shipped.compute_hash(),
        "table_intact": set(table) >= {90, 100},
    }
    config.compilation_config.pass_config = shipped
    _in_a_worker(config, scenario)
    return facts | {
        "worker_cap_bytes": shipped.flashinfer_max_size(scenario.world_size),
        "worker_endpoints": config.compilation_config.compile_ranges_endpoints,
        "plain_flashinfer_mb": shipped.default_fi_allreduce_fusion_max_size_mb().get(
            scenario.world_size
        ),
    }


def _in_a_worker(config: Any, scenario: Scenario) -> None:
    """What a worker does around vLLM's building of all-reduces, with peers of the same opinion."""
    from vllm.config import set_current_vllm_config

    from fusewise.engines.vllm import mark as marks
    from fusewise.engines.vllm import settle

    class Alike:
        world_size = scenario.world_size

        def __init__(self, process_group: Any, timeout_s: float) -> None: ...

        def unanimous(self, phase: str, value: Any, fault: Any) -> None:
            assert not fault

    with mock.patch("fusewise.ranks.group.Group", Alike), set_current_vllm_config(config):
        try:
            settle.agree(None)
        except AssertionError:
            return
        mark = marks.read(config)
        if mark and mark.wide_mb:  # full mode's last step, once its kernels are up
            marks.set_fusion_again(config, mark, mark.wide_mb)


def main() -> int:
    prepare()
    results = []
    for entry in json.load(sys.stdin):
        results.append(run(Scenario(**entry)))
    print(json.dumps(results))  # the last line; vLLM logs above it
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
