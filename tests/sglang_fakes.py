"""Stand-ins for what SGLang's real modules import: the rest of SGLang, FlashInfer, GPUs' answers.

``Simulated`` loads the modules of ``REAL`` from the wheel's sources, and answers for all others;
``World`` is what they meet in one scenario.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
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
    pdmux: bool = False
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
            hpu_communicator=None, npu_communicator=None, xpu_communicator=None,
            pymscclpp_comm=None, pynccl_comm=None, qr_comm=None, pcie_ipc_comm=None,
            torch_symm_mem_comm=None,
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
        made.enable_pdmux = self.scenario.pdmux
        made.model_runner = SimpleNamespace(
            is_draft_worker=draft, dtype=torch.bfloat16, model=None, max_running_requests=8,
            model_config=SimpleNamespace(hidden_size=self.scenario.hidden_size),
        )  # fmt: skip
        return made
