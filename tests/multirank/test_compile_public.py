"""``fusewise.compile`` as the documentation shows it: a live communicator, torch's own options."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

import fusewise
from tests.ranks import run_ranks


class Tail(torch.nn.Module):
    """The end of a layer, written with functional collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        total = collectives.all_reduce(x, "sum", dist.group.WORLD) + residual
        return torch.rms_norm(total, (64,), self.weight, 1e-6), total


def _compiled(rank: int) -> list[float]:
    model = Tail()
    x, residual = torch.full((4, 64), rank + 1.0), torch.ones(4, 64)
    with torch.no_grad():
        compiled = fusewise.compile(model)
        return [float((a - b).abs().max()) for a, b in zip(
            compiled(x, residual), model(x, residual), strict=True
        )]  # fmt: skip


def test_compile_works_with_a_communicator_of_its_own() -> None:
    for errors in run_ranks(_compiled, 2, timeout_s=110):
        assert max(errors) < 1e-5
