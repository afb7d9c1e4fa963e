"""What the pass rewrites in a graph, beyond what the ranks' tests run; fake tensors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusewise.graph.fusion_pass import FusionPass
from tests.traced import BF16, FP32, GROUP, H, always_fuse, fusion, normed, plain, reduced, trace


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
    one = FusionPass("group", {"float32": always_fuse("float32")})
    one(graph)
    assert one.sites[0].why == "the group has no name in the graph"


def test_an_all_reduce_on_another_device_is_left() -> None:
    one = FusionPass(GROUP, {"float32": always_fuse("float32")}, device_type="cuda")
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
