"""Small graphs as Inductor's post-grad passes see them, traced on fake tensors without ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fusewise.graph.fusion_pass import FusionPass
from fusewise.profiles.bands import Band, Plan, Table
from fusewise.shape import DType

H = 64
BF16, FP32 = torch.bfloat16, torch.float32
GROUP = "tp"
collectives = torch.ops._c10d_functional


def always_fuse(dtype: DType) -> Plan:
    bands = (Band(0, None, "shm.one_shot", "fuse", "measured"),)
    table = Table("all_reduce_rms_norm", H, bands, 0, 2**30)
    return Plan(dtype, "gloo + rms_norm", (table,), "test")


def fusion() -> FusionPass:
    return FusionPass(
        GROUP, {"float32": always_fuse("float32"), "bfloat16": always_fuse("bfloat16")}
    )


def reduced(x: Tensor, op: str = "sum", group: str = GROUP) -> Tensor:
    waited: Tensor = collectives.wait_tensor(collectives.all_reduce(x, op, group))
    return waited


def normed(s: Tensor, w: Tensor, dim: int = -1, power: int = 2) -> Tensor:
    h = s.float()
    return w * (h * torch.rsqrt(h.pow(power).mean(dim, keepdim=True) + 1e-6)).to(s.dtype)


def trace(
    function: Callable[..., Any], dtype: torch.dtype = FP32, **shapes: Any
) -> torch.fx.GraphModule:
    """A site as Inductor's post-grad passes see it: decomposed, functional, fake values."""
    x = torch.empty(8, H, dtype=dtype)
    r = torch.empty(shapes.get("residual", (8, H)), dtype=shapes.get("residual_dtype", dtype))
    w = torch.empty(shapes.get("weight", (H,)), dtype=shapes.get("weight_dtype", dtype))
    table = select_decomp_table()
    graph: torch.fx.GraphModule = make_fx(function, table, tracing_mode="fake")(x, r, w)
    graph.graph.eliminate_dead_code()
    return graph


def plain(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    return normed(s, w), s
