"""Full mode's router on two ranks, a GPU each or sharing one: in place, equal, captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewise.profiles.bands import Band, Plan, Table
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HIDDEN = 2048
PATTERN = "kARResidualRMSNorm"
EPS = 1e-6


def _plan() -> Plan:
    """Ours up to 1 MiB, vLLM's own all-reduce and our norm above."""
    bands = (
        Band(0, 2**20, "native.one_shot", "fuse", "measured"),
        Band(2**20, None, "nccl + rms_norm", "do not fuse", "measured"),
    )
    table = Table("all_reduce_rms_norm", HIDDEN, bands, 4096, 2**24)
    return Plan("bfloat16", "flashinfer.one_shot", (table,), "test")


def _route(rank: int, num_tokens: int) -> list[Any]:
    import torch.distributed as dist

    from fusewise.backends.steps import build_backend
    from fusewise.backends.symm_mem import OneShot
    from fusewise.engines.router import Router
    from fusewise.ranks.agreement import fingerprint_of
    from fusewise.ranks.group import Group
    from fusewise.ranks.place import shares_gpus
    from fusewise.shape import Shape

    def nccl(x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    def refuse(**kwargs: Any) -> None:
        raise AssertionError("this call was ours")

    group = Group()
    device = group.device
    inputs = [
        torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
        .to(device, torch.bfloat16) for seed in (rank, 7, 0, 1)
    ]  # fmt: skip
    weight = torch.linspace(0.5, 1.5, HIDDEN, device=device, dtype=torch.bfloat16)
    largest = Shape(512, HIDDEN)
    kernel, failed = build_backend("native.one_shot", group, fingerprint_of(group), largest)
    assert kernel is not None, failed
    native: Any = {"native.one_shot": kernel}
    # NCCL takes one rank per GPU, and gloo's sums cannot be captured.
    other = OneShot(group, Shape(1024, HIDDEN)) if shares_gpus() else None
    router = Router(native, _plan(), other.all_reduce if other else nccl, PATTERN, 2**20)
    x, residual = inputs[0].clone(), inputs[1].clone()
    call = {
        "input": x, "norm_out": x, "residual_in": residual, "residual_out": residual,
        "rms_gamma": weight, "rms_eps": EPS, "pattern": PATTERN, "quant_out": None,
    }  # fmt: skip
    router.fused(refuse, **call)
    eager = x.clone(), residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        router.fused(refuse, **call)
    for _ in range(3):
        x.copy_(inputs[0])
        residual.copy_(inputs[1])
        graph.replay()
    torch.cuda.synchronize()
    same = torch.equal(x, eager[0]) and torch.equal(residual, eager[1])
    group.barrier("replayed")
    kernel.close()
    total = (inputs[2].double() + inputs[3].double() + inputs[1].double()).cpu()
    norm = total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double().cpu()
    errors = [_error(eager[0], norm), _error(eager[1], total)]
    return [same, *errors, eager[0].view(torch.int16).sum().item()]


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("num_tokens", [1, 16, 255, 256, 1024])
def test_the_router_writes_in_place_and_ranks_agree(num_tokens: int) -> None:
    first, second = run_ranks(_route, 2, num_tokens, device="cuda", timeout_s=110)
    for same, norm_error, sum_error, _ in (first, second):
        assert same
        assert norm_error < 5e-3
        assert sum_error < 5e-3
    assert first[3] == second[3]
