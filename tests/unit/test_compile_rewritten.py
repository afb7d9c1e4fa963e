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


def _again(s: Tensor, w: Tensor) -> Any:
    h = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h, h


def _rootless(s: Tensor) -> Tensor:
    h = s.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(s.dtype)


def _in_float(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """As vLLM's own norm is written: the sum is rounded for the residual stream only."""
    s = reduced(x).float() + r.float()
    h = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h.to(x.dtype) * w, s.to(x.dtype)


def _autocast(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """bf16 from a matmul, an fp32 stream, a norm in fp32, bf16 for the next matmul."""
    s = r + reduced(x)
    return normed(s, w).to(BF16), s


def _gate(x: Tensor) -> Tensor:
    return torch.sigmoid(x[:, :1])


WIDE = {"dtype": BF16, "residual_dtype": FP32}
# name: (function, choices, all-reduces left, options of the trace)
MORE: dict[str, tuple[Callable[..., Any], list[str], dict[str, Any]]] = {
    "two all-reduces": (lambda x, r, w: normed(reduced(x) + reduced(r), w), ["fuse", "join"], {}),
    "two all-reduces and a residual": (
        lambda x, r, w: _kept(r + (reduced(x) + reduced(x * 2)), w), ["fuse", "join"], {},
    ),
    "the residual between": (
        lambda x, r, w: _kept((reduced(x) + r) + reduced(x * 2), w), ["fuse", "join"], {},
    ),
    "a gate on the second": (
        lambda x, r, w: _kept(r + (reduced(x) + _gate(r) * reduced(x * 2)), w),
        ["fuse", "join"], {},
    ),
    "rows regrouped on one of two": (
        lambda x, r, w: _kept(
            r.view(2, 4, H) + (reduced(x).view(2, 4, H) + reduced(x.view(2, 4, H))), w
        ),
        ["fuse", "join"], {},
    ),
    "a bias": (lambda x, r, w: _kept(r + (reduced(x) + w), w), ["fuse"], {}),
    "a replicated expert": (lambda x, r, w: _kept(r + (reduced(x) + r * 3), w), ["fuse"], {}),
    "a power of two": (lambda x, r, w: _kept(r + reduced(x) * 0.25, w), ["fuse"], {}),
    "divided by a power of two": (lambda x, r, w: _kept(r + reduced(x) / 8, w), ["fuse"], {}),
    "normalised row read again": (lambda x, r, w: _again(r + reduced(x), w), ["fuse"], {}),
    "no weight": (lambda x, r, w: _rootless(r + reduced(x)), ["fuse"], {"dtype": BF16}),
    "a matrix for weight": (lambda x, r, w: normed(r + reduced(x), r), ["fuse"], {}),
    "wide weight": (plain, ["fuse"], {"dtype": BF16, "weight_dtype": FP32}),
    "wide residual": (plain, ["fuse"], WIDE),
    "wide residual and weight": (plain, ["fuse"], {**WIDE, "weight_dtype": FP32}),
    "autocast": (_autocast, ["fuse"], {**WIDE, "weight_dtype": FP32}),
    "sum in float": (_in_float, ["fuse"], {"dtype": BF16}),
}  # fmt: skip


def _kept(s: Tensor, w: Tensor) -> Any:
    return normed(s, w), s


@pytest.mark.parametrize("name", MORE)
def test_further_sums_and_norms_are_one_operation(name: str) -> None:
    function, choices, options = MORE[name]
    module = trace(function, **options)
    expected = [(v.shape, v.dtype) for v in _results(module)]
    one = fusion()
    one(module.graph)
    module.graph.lint()
    assert [site.choice for site in one.sites] == choices, one.explain()
    text = str(module.graph)
    assert text.count("fusewise.all_reduce_rms_norm") == 1
    assert "_c10d_functional" not in text and "rsqrt" not in text
    assert [(v.shape, v.dtype) for v in _results(module)] == expected


def test_a_round_trip_through_fp8_stays_in_the_graph() -> None:
    def quantised(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return _rootless(r + reduced(x)).to(torch.float8_e4m3fn).to(BF16) * w

    module = trace(quantised, dtype=BF16)
    fusion()(module.graph)
    text = str(module.graph)
    assert "all_reduce_rms_norm" in text and "torch.float8_e4m3fn" in text
    assert text.index("all_reduce_rms_norm") < text.index("torch.float8_e4m3fn")


def _results(module: torch.fx.GraphModule) -> list[Tensor]:
    """Fake results, with every step's own type: what the graph now claims and what it gives."""
    inputs = module.graph.find_nodes(op="placeholder")
    with torch.no_grad(), inputs[0].meta["val"].fake_mode:
        return _run(module)


def _run(module: torch.fx.GraphModule) -> list[Tensor]:
    values: dict[Any, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            return [read.meta["val"] for read in node.all_input_nodes]
        if node.op == "call_function":
            arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), values.get)
            values[node] = node.target(*arguments, **keywords)
            if isinstance(values[node], Tensor):
                assert values[node].dtype == node.meta["val"].dtype, node
                assert values[node].shape == node.meta["val"].shape, node
        else:
            values[node] = node.meta["val"]
    raise AssertionError("a graph ends in its output")


def test_a_factor_goes_before_the_sum_where_that_was_declared() -> None:
    one = FusionPass(GROUP, {"float32": always_fuse("float32")}, scale_first=True)
    module = trace(lambda x, r, w: normed(r + reduced(x) * 0.22, w))
    one(module.graph)
    assert [site.choice for site in one.sites] == ["fuse"]
    assert "0.22" in str(module.graph)


def test_a_training_graph_is_only_looked_at() -> None:
    module = trace(plain)
    before = str(module.graph)
    one = fusion()
    one.rewrite(module.graph, inference=False)
    assert str(module.graph) == before
    assert one.sites[0].why == "a training graph"


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
