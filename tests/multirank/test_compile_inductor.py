"""The pass inside Inductor itself, code generation and caches included, on two CPU ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc

from tests.compiled import boundary_profile
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)  # ranks compile; other suites may share the cores

H, TOKENS = 64, 8
ALWAYS, NEVER = 16, 0  # the last token count at which a profile fuses


def _layer(x: Any, r: Any, w: Any) -> Any:
    s = r + fc.all_reduce(x, "sum", dist.group.WORLD)
    h = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (w * h).relu(), s


def _session(rank: int, cache: str) -> list[dict[str, Any]]:
    """Three compiles of one model; the second and third begin with what the first left on disk."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / str(rank))
    return [_compile_once(rank, last_fused) for last_fused in (ALWAYS, ALWAYS, NEVER)]


def _compile_once(rank: int, last_fused: int) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    import fusewise.graph.api
    from fusewise.communicator import Communicator

    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, H, generator=generator)
    r, w = torch.ones(TOKENS, H), torch.full((H,), 0.5)
    calls = 0
    with torch.no_grad(), Communicator(profile=boundary_profile(last_fused, H)) as communicator:
        run = communicator.all_reduce_rms_norm

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return run(*args)

        communicator.all_reduce_rms_norm = counted  # type: ignore[method-assign]
        fusion = fusewise.graph.api.fusion_pass(communicator=communicator)
        compiled = fusewise.graph.api.compile(_layer, fusion=fusion, fullgraph=True)
        got = compiled(x, r, w)
        expected = _layer(x, r, w)
    return {
        "calls": calls,
        "choices": [site.choice for site in fusion.sites],
        "cache hits": counters["inductor"]["fxgraph_cache_hit"]
        + counters["aot_autograd"]["autograd_cache_hit"],
        "difference": max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)),
        "uuid": fusion.uuid(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(_session, 2, str(tmp_path_factory.mktemp("inductor")), timeout_s=240)


def test_the_first_compile_rewrites(ranks: list[list[dict[str, Any]]]) -> None:
    for first, _, _ in ranks:
        assert (first["choices"], first["calls"]) == (["fuse"], 1)
        assert first["cache hits"] == 0
        assert first["difference"] <= 1e-5


def test_the_second_comes_from_the_cache_and_is_still_rewritten(
    ranks: list[list[dict[str, Any]]],
) -> None:
    for first, second, _ in ranks:
        assert second["uuid"] == first["uuid"]
        assert second["cache hits"] > 0
        assert (second["choices"], second["calls"]) == ([], 1)
        assert second["difference"] <= 1e-5


def test_another_profile_never_gets_the_cached_graph(ranks: list[list[dict[str, Any]]]) -> None:
    for first, _, third in ranks:
        assert third["uuid"] != first["uuid"]
        assert third["cache hits"] == 0
        assert (third["choices"], third["calls"]) == (["leave"], 0)
        assert third["difference"] <= 1e-5
