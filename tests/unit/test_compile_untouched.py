"""What the pass must leave as it was, one graph each; no ranks, fake tensors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fusewise.bands import Band, Plan, Table
from fusewise.graph.fusion_pass import FusionPass
from fusewise.shape import DType

H = 64
BF16, FP32 = torch.bfloat16, torch.float32
GROUP = "tp"
collectives = torch.ops._c10d_functional


def _always_fuse(dtype: DType) -> Plan:
    bands = (Band(0, None, "shm.one_shot", "fuse", "measured"),)
    table = Table("all_reduce_rms_norm", H, bands, 0, 2**30)
    return Plan(dtype, "gloo + rms_norm", (table,), "test")


def fusion() -> FusionPass:
    return FusionPass(
        GROUP, {"float32": _always_fuse("float32"), "bfloat16": _always_fuse("bfloat16")}
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


def _max(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x, "max"), w)


def _average(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x, "avg"), w)


def _other_group(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x, group="dp"), w)


def _reduced_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    y = reduced(x)
    return normed(r + y, w), y.relu()


def _square_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    square = s.pow(2)
    return w * (s * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6)), square


def _root_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    root = torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (s * root), root


def _scaled_used_elsewhere(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    scaled = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * scaled, scaled


def _residual_with_factor(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(torch.add(r, reduced(x), alpha=2), w)


def _other_dimension(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), w, dim=0)


def _other_power(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), w, power=4)


def _no_weight(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    return s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)


def _gate_for_weight(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(r + reduced(x), r)


def _layer_norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return torch.nn.functional.layer_norm(r + reduced(x), (H,), w)


def _nothing_follows(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return reduced(x).relu()


def _bias_between(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(x) + w, w)


def _waited_twice(x: Tensor, r: Tensor, w: Tensor) -> Any:
    y = collectives.all_reduce(x, "sum", GROUP)
    return normed(r + collectives.wait_tensor(y), w), collectives.wait_tensor(y)


def _weight_behind(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    return normed(s, s.sum(0))


def _row_split(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return normed(reduced(x).view(16, 32), w[:32])


def _weight_of_another_norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return torch.ops.aten._fused_rms_norm(r, [H], reduced(x[0]), 1e-6)[0]


CASES: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "max": (_max, "the reduction is 'max'", {}),
    "average": (_average, "the reduction is 'avg'", {}),
    "another group": (_other_group, "another group: 'dp'", {}),
    "reduced tensor read again": (_reduced_used_elsewhere, "the reduced tensor is used", {}),
    "square read again": (_square_used_elsewhere, "an intermediate of the norm", {}),
    "root read again": (_root_used_elsewhere, "an intermediate of the norm", {}),
    "scaled read again": (_scaled_used_elsewhere, "an intermediate of the norm", {}),
    "residual with a factor": (_residual_with_factor, "with a factor", {}),
    "another dimension": (_other_dimension, "no RMSNorm follows", {}),
    "another power": (_other_power, "no RMSNorm follows", {}),
    "no weight": (_no_weight, "no weight of one row", {}),
    "gate for weight": (_gate_for_weight, "no weight of one row", {}),
    "layer norm": (_layer_norm, "no RMSNorm follows", {}),
    "nothing follows": (_nothing_follows, "no RMSNorm follows", {}),
    "bias between": (_bias_between, "shapes differ", {}),
    "waited twice": (_waited_twice, "not waited for exactly once", {}),
    "weight computed later": (_weight_behind, "computed behind the sum", {}),
    "rows split": (_row_split, "no RMSNorm follows", {}),
    "weight of another norm": (_weight_of_another_norm, "no RMSNorm follows", {}),
    "weight of one element": (plain, "is no row", {"weight": (1,)}),
    "residual of one row": (plain, "shapes differ", {"residual": (1, H)}),
    "wide weight": (plain, "dtypes differ", {"dtype": BF16, "weight_dtype": FP32}),
    "wide residual": (plain, "dtypes differ", {"dtype": BF16, "residual_dtype": FP32}),
    "no plan for the dtype": (plain, "no plan for torch.float64", {"dtype": torch.float64}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_stays_as_it_was(case: str) -> None:
    function, reason, options = CASES[case]
    module = trace(function, **options)
    before = str(module.graph)
    one = fusion()
    one(module.graph)
    assert str(module.graph) == before
    assert [site.choice for site in one.sites] == ["leave"]
    assert reason in one.sites[0].why


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_same_graph_without_the_obstacle_is_rewritten(dtype: torch.dtype) -> None:
    """Otherwise the cases above could pass because nothing is ever rewritten."""
    module = trace(plain, dtype=dtype)
    one = fusion()
    one(module.graph)
    module.graph.lint()
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert names[0] == "fusewise.all_reduce_rms_norm.default"
    assert set(names[1:]) == {"<built-in function getitem>"}
    assert one.sites[0].rewritten


def _fused_norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """What ``F.rms_norm`` dispatches to on GPUs."""
    s = r + reduced(x)
    return torch.ops.aten._fused_rms_norm(s, [H], w, 1e-5)[0], s


def _composite_norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    s = r + reduced(x)
    return torch.nn.functional.rms_norm(s, (H,), w, 1e-5), s


@pytest.mark.parametrize("function", [_fused_norm, _composite_norm])
def test_torchs_norm_as_one_operation_is_rewritten(function: Callable[..., Any]) -> None:
    inputs = torch.empty(8, H), torch.empty(8, H), torch.empty(H)
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    module.graph.eliminate_dead_code()  # as Inductor does before the pass
    assert "rms_norm" in str(module.graph)
    one = fusion()
    one(module.graph)
    module.graph.lint()
    assert one.sites[0].choice == "fuse"
    assert "(%x_1, %r_1, %w_1, 1e-05, 0.0, tp)" in str(module.graph)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_torchs_norm_as_inductor_decomposes_it_for_gpus(dtype: torch.dtype) -> None:
    from torch._decomp.decompositions import _fused_rms_norm

    def decomposed(x: Tensor, r: Tensor, w: Tensor) -> Any:
        s = r + reduced(x)
        return _fused_rms_norm(s, [H], w, 1e-5)[0], s

    module = trace(decomposed, dtype=dtype)
    one = fusion()
    one(module.graph)
    assert one.sites[0].choice == "fuse", f"{one.explain()} {module.graph}"


def test_a_wide_stream_keeps_its_own_cast() -> None:
    """fp32 residual stream, bf16 matmul behind: the norm ends before the cast."""

    def wide(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return normed(r + reduced(x), w).to(BF16)

    module = trace(wide)
    one = fusion()
    one(module.graph)
    assert one.sites[0].choice == "fuse"
    assert "convert_element_type" in str(module.graph)


def test_two_reductions_added_to_each_other_become_one_site() -> None:
    def both(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return normed(reduced(x) + reduced(r), w)

    module = trace(both)
    one = fusion()
    one(module.graph)
    module.graph.lint()
    assert [site.choice for site in one.sites] == ["fuse", "leave"]


def test_a_group_that_is_a_graph_input_is_left() -> None:
    module = trace(plain)
    graph = module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        group = graph.placeholder("group")
    for node in graph.nodes:
        if "all_reduce" in node.name:
            node.args = (*node.args[:2], group)
    one = FusionPass("group", {"float32": _always_fuse("float32")})
    one(graph)
    assert one.sites[0].why == "the group has no name in the graph"


def test_an_all_reduce_on_another_device_is_left() -> None:
    one = FusionPass(GROUP, {"float32": _always_fuse("float32")}, device_type="cuda")
    one(trace(plain).graph)
    assert one.sites[0].why == "on another device: cpu"


def test_a_second_pass_finds_nothing_left_to_do() -> None:
    module = trace(plain)
    fusion()(module.graph)
    before = str(module.graph)
    again = fusion()
    again(module.graph)
    assert str(module.graph) == before and not again.sites


def test_explain_lists_every_site_with_its_reason() -> None:
    def two(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return plain(x, r, w), reduced(r, "max")

    one = fusion()
    assert "No graph was compiled" in one.explain()
    one(trace(two).graph)
    head, first, second = one.explain().splitlines()
    assert head == "graph 0: 1 of 2 all-reduces rewritten"
    assert "[8, 64] float32, 8 tokens: fuse (0B–…: shm.one_shot (fuse))" in first
    assert "leave (the reduction is 'max', not 'sum')" in second
