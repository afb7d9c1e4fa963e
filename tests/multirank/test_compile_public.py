"""``fusewise.compile`` as docs/compile.md shows it: its own examples on two CPU ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from tests.compiled import boundary_profile
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)  # ranks compile; other suites may share the cores

DOCUMENT = Path(__file__).parents[2] / "docs" / "compile.md"
H, TOKENS = 64, 4


class Tail(torch.nn.Module):
    """The end of a layer, written with functional collectives; eps is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(H))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        total = collectives.all_reduce(x, "sum", dist.group.WORLD) + residual
        square = total.pow(2).mean(-1, keepdim=True)
        return self.weight * (total * torch.rsqrt(square + self.eps)), total


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def _examples(rank: int, folder: str) -> list[dict[str, Any]]:
    os.chdir(folder)
    if rank == 0:
        made = boundary_profile(TOKENS + 12, H)
        Path("my-node.json").write_text(made.model_dump_json(exclude_none=True))
    dist.barrier()
    model = Tail()
    x, residual = torch.full((TOKENS, H), rank + 1.0), torch.ones(TOKENS, H)
    names: dict[str, Any] = {"model": model, "tp": dist.group.WORLD, "torch": torch}
    names |= {"x": x, "residual": residual}
    results = []
    for example in examples():
        torch._dynamo.reset()
        exec(compile(example, str(DOCUMENT), "exec"), names)
        with torch.no_grad():
            pairs = zip(names["compiled"](x, residual), model(x, residual), strict=True)
            difference = max(float((a - b).abs().max()) for a, b in pairs)
        fusion = names.get("own") or names.get("fusion")
        sites = [site.rewritten for site in fusion.sites] if fusion else []
        results.append({"difference": difference, "rewritten": sites})
    return results


def test_the_documentations_examples_run_and_rewrite(tmp_path: Path) -> None:
    for results in run_ranks(_examples, 2, str(tmp_path), timeout_s=200):
        assert [result["rewritten"] for result in results] == [[], [True], [True]]
        assert max(result["difference"] for result in results) < 1e-5
