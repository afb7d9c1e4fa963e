"""The pass inside Inductor itself, code generation and caches included, on two CPU ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc

from tests.compiled import boundary_profile, share_kernels
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)  # ranks compile; other suites may share the cores

H, TOKENS = 64, 8
ALWAYS, NEVER = 16, 0  # the last token count at which a profile fuses


def _layer(x: Any, r: Any, w: Any) -> Any:
    s = r + fc.all_reduce(x, "sum", dist.group.WORLD)
    h = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (w * h).relu(), s


def _three_compiles(rank: int, cache: str) -> list[dict[str, Any]]:
    """Three compiles of one model; the second and third begin with what the first left on disk.

    The second goes by ``compile(profile=...)``, which makes its communicator and pass itself.
    """
    from fusewise.graph.api import compile as compile_model
    from fusewise.graph.api import fusion_pass
    from fusewise.run.communicator import Communicator
    from fusewise.run.registry import communicator_for

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / str(rank))
    share_kernels(cache)
    results = []
    for last_fused in (ALWAYS, NEVER):
        with Communicator(profile=boundary_profile(last_fused, H)) as communicator:
            fusion = fusion_pass(communicator=communicator)
            compiled = compile_model(_layer, fusion=fusion, fullgraph=True)
            results.append(_run(rank, compiled, communicator))
            results[-1]["sites"] = [site.choice for site in fusion.sites]
        if last_fused == ALWAYS:
            torch._dynamo.reset()
            compiled = compile_model(_layer, profile=boundary_profile(ALWAYS, H), fullgraph=True)
            communicator = communicator_for(dist.group.WORLD.group_name)
            results.append(_run(rank, compiled, communicator))
            communicator.close()
            torch._dynamo.reset()
    return results


def _run(rank: int, compiled: Any, communicator: Any) -> dict[str, Any]:
    """One call of a model compiled just now: what it computed and which way it went."""
    from torch._dynamo.utils import counters

    counters.clear()
    run, calls = communicator.untraced_norm, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return run(*args)

    communicator.untraced_norm = counted
    x = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(rank))
    r, w = torch.ones(TOKENS, H), torch.full((H,), 0.5)
    with torch.no_grad():
        got, expected = compiled(x, r, w), _layer(x, r, w)
    return {
        "calls": len(calls),
        "cache hits": counters["inductor"]["fxgraph_cache_hit"]
        + counters["aot_autograd"]["autograd_cache_hit"],
        "difference": max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(_three_compiles, 2, str(tmp_path_factory.mktemp("inductor")), timeout_s=240)


def test_the_first_compile_rewrites(ranks: list[list[dict[str, Any]]]) -> None:
    for first, _, _ in ranks:
        assert (first["sites"], first["calls"]) == (["fuse"], 1)
        assert first["cache hits"] == 0
        assert first["difference"] <= 1e-5


def test_the_second_comes_from_the_cache_and_is_still_rewritten(
    ranks: list[list[dict[str, Any]]],
) -> None:
    for _, second, _ in ranks:
        assert second["cache hits"] > 0
        assert second["calls"] == 1
        assert second["difference"] <= 1e-5


def test_another_profile_never_gets_the_cached_graph(ranks: list[list[dict[str, Any]]]) -> None:
    for _, _, third in ranks:
        assert third["cache hits"] == 0
        assert (third["sites"], third["calls"]) == (["leave"], 0)
        assert third["difference"] <= 1e-5
