"""The communicator on real CPU ranks, against a float64 reference."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _all_ops(rank: int) -> str:
    from fusewise import Communicator
    with Communicator() as c:
        x = torch.randn(5,256,dtype=torch.bfloat16)
        out,res = c.all_reduce_rms_norm(x, x, x[0])
        out,res = torch.ops.fusewise.all_reduce_rms_norm(x, None, x[0],1e-6,0.0,dist.group.WORLD.group_name) if False else (out,res)
        return str(out.sum())

def test_a():
    print(run_ranks(_all_ops,2))
