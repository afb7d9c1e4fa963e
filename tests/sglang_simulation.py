"""One rank of SGLang's own plugin and fusion code without a GPU, scenario by scenario.

Real: the wheel's sources named in ``sglang_fakes.REAL`` (its plugin loader and registry of hooks,
the gate, the workspace step, FlashInfer's plain all-reduce, the group's dispatch), our agreement
over gloo ranks, our plugin found by its entry point. Simulated: everything else of SGLang,
FlashInfer, the node's fingerprint. Ranks are processes; each runs every scenario, in order.

Usage: ``python sglang_simulation.py RANK WORLD STORE`` with the sources on ``PYTHONPATH`` and a
JSON list of scenarios on stdin; the last line printed is a JSON list of results.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.sglang_fakes import FUSED, FUSION, GATE, Scenario, Simulated, World

TOKENS = (1, 36, 37, 64, 65, 256, 257, 512, 513, 2048, 2049)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


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
