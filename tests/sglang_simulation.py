"""One rank of SGLang's own plugin and fusion code without a GPU, scenario by scenario.

Real: the wheel's sources named in ``REAL`` (its plugin loader and registry of hooks, the gate, the
workspace step, FlashInfer's plain all-reduce, the group's dispatch), our agreement over gloo ranks,
our plugin found by its entry point. Simulated: everything else of SGLang (``Simulated``),
FlashInfer, the node's fingerprint. Ranks are processes; each runs every scenario, in order.

Usage: ``python sglang_simulation.py RANK WORLD STORE`` with the sources on ``PYTHONPATH`` and a
JSON list of scenarios on stdin; the last line printed is a JSON list of results.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
import types
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

GATE = "sglang.srt.layers.layer_boundary.residual.add_norm"
FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
RUNNER = "sglang.srt.model_executor.runner.base_runner"
STATE = "sglang.srt.distributed.parallel_state"
FUSED = "sglang.srt.layers.layer_boundary.fusions.allreduce"
REAL = (
    GATE, FUSION, RUNNER, STATE, FUSED, "sglang.srt.environ", "sglang.srt.plugins",
    "sglang.srt.plugins.hook_registry",
)  # fmt: skip
SOURCES = Path(os.environ.get("SGLANG_SOURCES", "."))
TOKENS = (1, 36, 37, 64, 65, 256, 257, 512, 513, 2048, 2049)


@dataclass
class Scenario:
    """One start of a worker. ``ranks``: more of the environment, by rank."""

    environ: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, dict[str, str]] = field(default_factory=dict)
    sm: int = 90
    node_ranks: int = 8
    multicast: bool = True
    hidden_size: int = 7168
    backend: str | None = "auto"
    own_kernels: bool = True
    mscclpp: bool = False
    worker: bool = True
    draft: bool = False
    version: str | None = None
    threshold: int | None = None
    moved: str | None = None
    unhooked: str | None = None
    other_group: bool = False
    no_workspace: bool = False
    unbuilt: int | None = None
    other_plan: int | None = None
    traced: int | None = None


class Simulated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the real modules of ``REAL``; stands in for all others of SGLang and FlashInfer."""

    def __init__(self, given: dict[str, dict[str, Any]]) -> None:
        self.given = given

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name in REAL:
            base = SOURCES / name.replace(".", "/")
            package = (base / "__init__.py").exists()
            file = base / "__init__.py" if package else base.with_suffix(".py")
            return importlib.util.spec_from_file_location(
                name, file, submodule_search_locations=[str(base)] if package else None
            )
        if name.split(".", maxsplit=1)[0] in ("sglang", "flashinfer", "msgspec"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return Answering(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []
        vars(module).update(self.given.get(module.__name__, {}))


class Answering(types.ModuleType):
    """A module that has every name: ``is_…`` says no, the rest are mocks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = no if name.startswith("is_") else mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


def no(*args: Any, **kwargs: Any) -> bool:
    return False


def yes(*args: Any, **kwargs: Any) -> bool:
    return True


def unchanged(function: Any = None, **_: Any) -> Any:
    """SGLang's ``register_custom_op`` without torch's library."""
    return function if function is not None else unchanged


class Workspace:
    """FlashInfer's: it holds what it was made for."""

    def __init__(self, backend: str, max_token_num: int, hidden_dim: int, **_: Any) -> None:
        self.backend = backend
        self.metadata = {"use_fp32_lamport": False}
        self.elements = max_token_num * hidden_dim

    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: Any, use_oneshot: Any = None
    ) -> bool:
        return num_tokens * hidden_dim <= self.elements


class Custom:
    """SGLang's own kernels, or vLLM's (which do not know multicast)."""

    disabled = False

    def should_custom_ar(self, x: Any) -> bool:
        return bool(x.numel() * x.element_size() <= 16 * 2**20)

    def custom_all_reduce(self, x: Any) -> str:
        return "custom"


class OwnKernels(Custom):
    has_multicast = True


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


class World:
    """What SGLang's code meets in one scenario: its context, FlashInfer, a process group."""

    def __init__(self, scenario: Scenario, rank: int, members: list[int]) -> None:
        self.scenario, self.rank = scenario, rank
        # A group of its own per scenario: nothing of one before can be heard.
        self.process_group = dist.new_group(members, timeout=timedelta(seconds=20))
        self.fused_calls: list[str] = []
        self.comm = SimpleNamespace(
            flashinfer_allreduce_fusion_backend=scenario.backend,
            enable_mscclpp=scenario.mscclpp,
            enable_torch_symm_mem=False,
            enable_symm_mem=False,
        )

    def modules(self) -> dict[str, dict[str, Any]]:
        sm, size = self.scenario.sm, len(dist.get_process_group_ranks(self.process_group))
        platform = SimpleNamespace(is_sm90=sm == 90, is_sm100=sm == 100, is_blackwell=sm == 100)
        self.parallel = SimpleNamespace(
            tp_size=size, nnodes=1, tp_group=None, attn_tp_size=size, moe_ep_size=1,
            moe_tp_size=size, attn_tp_rank=self.rank, attn_tp_group=None, moe_tp_group=None,
        )  # fmt: skip
        utils = {
            "is_cuda": yes, "is_flashinfer_available": yes, "get_bool_env_var": no,
            "ceil_align": max,
        }  # fmt: skip
        parallel, resources = self.parallel, SimpleNamespace(buffers={})
        execution = SimpleNamespace(comm=self.comm)
        context = {
            "get_platform": lambda: platform,
            "get_exec": lambda: execution,
            "get_parallel": lambda: parallel,
            "get_resources": lambda: resources,
        }
        pattern = SimpleNamespace(kARResidualRMSNorm="fused", kAllReduce="plain")
        comm = {
            "AllReduceFusionPattern": pattern,
            "allreduce_fusion": self.allreduce_fusion,
            "create_allreduce_fusion_workspace": Workspace,
        }
        base = type("Base", (), {"__init__": lambda self, *a, **k: None})
        struct = type("Struct", (), {"__init_subclass__": lambda **_: None})
        moe = {
            "can_merge_post_experts_all_reduce": no,
            "post_experts_reduction_group": lambda: self.parallel.moe_tp_group,
        }
        return {
            "sglang.srt.utils": utils,
            "sglang.srt.utils.custom_op": {"register_custom_op": unchanged},
            "sglang.srt.runtime_context": context,
            "sglang.srt.layers.moe.utils": moe,
            "sglang.srt.layers.moe": moe,
            "flashinfer.comm": comm,
            "flashinfer.comm.mnnvl": {"TorchDistBackend": base, "CommBackend": base},
            "msgspec": {"Struct": struct},
        }

    def allreduce_fusion(self, **given: Any) -> None:
        self.fused_calls.append(given["pattern"])

    def build(self) -> None:
        """The groups as SGLang has them without attention DP: one set of ranks everywhere."""
        state = importlib.import_module(STATE)
        group = object.__new__(state.GroupCoordinator)
        vars(group).update(
            unique_name="tp:0", world_size=self.parallel.tp_size, rank_in_group=self.rank,
            ranks=dist.get_process_group_ranks(self.process_group), local_size=0,
            device_group=self.process_group, cpu_group=self.process_group,
            hpu_communicator=None, xpu_communicator=None, pymscclpp_comm=None, pynccl_comm=None,
            qr_comm=None, pcie_ipc_comm=None, torch_symm_mem_comm=None,
            ca_comm=OwnKernels() if self.scenario.own_kernels else Custom(),
            is_symmetric_memory_enabled=no, _fi_workspace_hint="attn_tp",
        )  # fmt: skip
        state._groups["tp:0"] = lambda: group
        moe = SimpleNamespace(
            ranks=[7, 8], world_size=2, rank_in_group=self.rank, device_group=self.process_group,
            cpu_group=self.process_group,
        )  # fmt: skip
        self.parallel.tp_group = self.parallel.attn_tp_group = group
        self.parallel.moe_tp_group = moe if self.scenario.other_group else group
        gate, fusion = importlib.import_module(GATE), importlib.import_module(FUSION)
        importlib.import_module(FUSED)  # holds the gate by name before it is hooked
        if self.scenario.threshold is not None:
            gate.FUSE_ALLREDUCE_MAX_BATCH_SIZE = self.scenario.threshold
        boundary = importlib.import_module("sglang.srt.layers.layer_boundary")
        boundary.FUSE_ALLREDUCE_MAX_BATCH_SIZE = gate.FUSE_ALLREDUCE_MAX_BATCH_SIZE
        fusion.is_one_nvlink_clique = yes
        fusion.in_the_same_node_as = lambda group, source_rank: [True] * group.size()
        fusion._preflight_check_workspace_memory = no if self.scenario.no_workspace else yes
        gate.is_dp_attention_enabled = no

    def runner(self, draft: bool) -> Any:
        runner_class = importlib.import_module(RUNNER).BaseRunner
        concrete: Any = type("Runner", (runner_class,), {})
        concrete.__abstractmethods__ = frozenset()
        made = object.__new__(concrete)
        made.model_runner = SimpleNamespace(
            is_draft_worker=draft, dtype=torch.bfloat16, model=None, max_running_requests=8,
            model_config=SimpleNamespace(hidden_size=self.scenario.hidden_size),
        )  # fmt: skip
        return made


def run(scenario: Scenario, rank: int, members: list[int]) -> dict[str, Any]:
    """Loads the plugins, runs SGLang's workspace step, and asks SGLang what it would do now."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("sglang", "flashinfer")]:
        del sys.modules[name]
    for name in [n for n in sys.modules if n.startswith("fusewise.engines.sglang")]:
        del sys.modules[name]
    world = World(scenario, rank, members)
    lines, finder = Lines(), Simulated(world.modules())
    log = logging.getLogger("sglang.plugins.fusewise")
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    sys.meta_path.insert(0, finder)
    environ = scenario.environ | scenario.ranks.get(str(rank), {})
    try:
        with mock.patch.dict(os.environ, environ), _pretences(scenario, rank):
            world.build()
            if scenario.worker:
                importlib.import_module("sglang.srt.managers.scheduler")
            loader = importlib.import_module("sglang.srt.plugins")
            loader.load_plugins()
            if scenario.unhooked:
                module, name = scenario.unhooked.rsplit(".", 1)
                there = importlib.import_module(module)
                setattr(there, name, getattr(there, name).__wrapped__)
            for draft in [True, False] if scenario.draft else [False]:
                world.runner(draft)._pre_initialize_flashinfer_allreduce_workspace()
            return _facts(world) | {"log": lines.lines}
    finally:
        sys.meta_path.remove(finder)
        log.removeHandler(lines)


def _pretences(scenario: Scenario, rank: int) -> Any:
    """What stands between the plugin and this machine."""
    from fusewise.engines.seams import Seam
    from fusewise.engines.sglang import seams, settle, takeover
    from fusewise.node import Fingerprint
    from tests.vllm_fakes import Ours

    node = Fingerprint(
        device_type="cuda", device="NVIDIA H200", sm=scenario.sm, world_size=scenario.node_ranks,
        fabric="nv18", multicast=scenario.multicast,
    )  # fmt: skip

    class Native(Ours):
        @classmethod
        def available(cls, node: Any) -> None:
            return None

        def __init__(self, group: Any, largest: Any) -> None:
            if rank == scenario.unbuilt:
                raise RuntimeError("no compiler")
            super().__init__(largest.num_tokens)

    real = importlib.metadata.version

    def version(name: str) -> str:
        return scenario.version if name == "sglang" and scenario.version else real(name)

    stack = contextlib.ExitStack()
    patch = mock.patch
    stack.enter_context(patch("fusewise.ranks.agreement.fingerprint_of", lambda group: node))
    stack.enter_context(patch("fusewise.backends.steps.backend_class", lambda name: Native))
    stack.enter_context(patch.object(importlib.metadata, "version", version))
    stack.enter_context(patch.object(settle, "TIMEOUT_S", 1.5))
    if scenario.moved:
        kept = (*seams.READ_SEAMS, Seam("a test", GATE, scenario.moved))
        stack.enter_context(patch.object(settle, "READ_SEAMS", kept))
    if scenario.other_plan == rank:
        plan = takeover._plan

        def moved(*args: Any) -> Any:
            import dataclasses

            return dataclasses.replace(plan(*args), baseline="nccl + rms_norm", source="another")

        stack.enter_context(patch.object(takeover, "_plan", moved))
    return stack


def _facts(world: World) -> dict[str, Any]:
    from fusewise.engines.sglang.bounds import BOUNDS

    gate, fused = importlib.import_module(GATE), importlib.import_module(FUSED)
    plan = SimpleNamespace(norm=SimpleNamespace(forward_with_allreduce_fusion=_fuses))
    hidden = world.scenario.hidden_size
    batches = {t: torch.empty(t, hidden, dtype=torch.bfloat16, device="meta") for t in TOKENS}
    fuses = {t: fused.fused_ffn_input(plan, x, x, None) is not None for t, x in batches.items()}
    plain = {t: _plain_path(world, x) for t, x in batches.items()}
    direct = gate.flashinfer_ar_fusion_applies
    return {
        "fuses_up_to": max((t for t, yes in fuses.items() if yes), default=0),
        "plain_flashinfer_up_to": max((t for t, p in plain.items() if p == "plain"), default=0),
        "same_where_imported": fused.flashinfer_ar_fusion_applies is direct,
        "hooked": hasattr(direct, "__wrapped__"),
        "bounds": [BOUNDS.max_tokens, BOUNDS.plain_bytes, BOUNDS.router is not None],
        "routed": _routed(world) if BOUNDS.router is not None else None,
        "traced": _traced(direct) if world.scenario.traced == world.rank else None,
    }


def _fuses(*args: Any, **kwargs: Any) -> str:
    return "fused"


def _plain_path(world: World, x: Any) -> str:
    """What SGLang's own dispatch runs for a plain all-reduce."""
    world.fused_calls.clear()
    answer = world.parallel.tp_group.all_reduce(x)
    return world.fused_calls[0] if world.fused_calls else str(answer)


def _routed(world: World) -> dict[int, str]:
    """Which kernel SGLang's custom operator reaches, by tokens."""
    fusion = importlib.import_module(FUSION)
    from fusewise.engines.sglang.bounds import BOUNDS

    (ours,) = BOUNDS.router.native.values()
    BOUNDS.router.plain = lambda x: x * 2
    found = {}
    for tokens in (256, 512, 1024, 2048):
        world.fused_calls.clear()
        ours.calls.clear()
        x = torch.ones(tokens, world.scenario.hidden_size, dtype=torch.bfloat16)
        norm, total = fusion.flashinfer_allreduce_residual_rmsnorm(
            x, torch.zeros_like(x), torch.ones_like(x[0]), max_token_num=2048
        )
        found[tokens] = "ours" if ours.calls else "flashinfer" if world.fused_calls else "unfused"
        if found[tokens] != "flashinfer":
            assert torch.equal(total, torch.full_like(x, 2)) and norm.shape == x.shape
    return found


def _traced(gate: Any) -> list[bool]:
    """The gate inside a graph with a symbolic number of tokens: the same answers."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if gate(x.shape[0]) else x - 1

    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    return [bool(compiled(torch.zeros(tokens)).sum() > 0) for tokens in TOKENS]


def main() -> int:
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    results = [run(Scenario(**entry), rank, list(range(size))) for entry in json.load(sys.stdin)]
    dist.destroy_process_group()
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
