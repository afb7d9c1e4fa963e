"""Every GPU backend on two ranks, a GPU each or sharing one: sums, limits, graphs, closing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WORLD = 2
BACKENDS = (
    "nccl", "nccl_symm", "symm_mem.one_shot", "symm_mem.two_shot", "multimem", "custom",
    "flashinfer.one_shot", "flashinfer.two_shot", "flashinfer.mnnvl",
)  # fmt: skip
HIDDEN_SIZES = (2048, 2880, 3584, 7168)
TOKENS = (1, 2, 3, 8, 16, 17, 64, 129, 512)
REPLAYS = 1000
SHARED_REPLAYS = 100  # ranks that share a GPU take turns on it, milliseconds each
BUILD_AND_RUN_S = 540.0  # FlashInfer compiles its kernels when no prebuilt ones are there


def _build(backend_id: str) -> tuple[Any, Any, str]:
    """The group, the backend sized for 4 MiB of bf16, or why it cannot run here at all.

    A backend that says it is available must be built; anything else fails the test.
    """
    from fusewise.backends.registry import backend_class
    from fusewise.backends.steps import build_backend
    from fusewise.ranks.agreement import fingerprint_of
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

    group = Group(timeout_s=300)
    node = fingerprint_of(group)
    unavailable = backend_class(backend_id).available(node)
    if unavailable:
        return group, None, unavailable
    backend, failed = build_backend(backend_id, group, node, Shape(1024, 2048))
    assert backend is not None, failed
    return group, backend, ""


def _inputs(group: Any, shape: Any, seed: int) -> list[torch.Tensor]:
    from fusewise.tune.operands import integers

    return [integers(shape, rank, group.device, seed) for rank in range(group.world_size)]


def _exact(backend: Any, shape: Any, seed: int) -> None:
    """Integer sums to the last bit, through both operations, twice in a row."""
    group = backend.group
    inputs = _inputs(group, shape, seed)
    x, residual = inputs[group.rank].clone(), _inputs(group, shape, seed + 1)[0]
    weight = torch.ones(shape.hidden_size, dtype=x.dtype, device=group.device)
    total = torch.stack(inputs).float().sum(0)
    for _ in range(2):
        if backend.plain:
            assert torch.equal(backend.all_reduce(x).float(), total), f"{shape}: sum"
        norm, added = backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
        with_residual = total + residual.float()
        assert torch.equal(added.float(), with_residual), f"{shape}: residual"
        scale = torch.rsqrt(with_residual.square().mean(-1, keepdim=True) + 1e-6)
        # One rounding of the output; fp32 has none to hide the order of the row's sum behind.
        budget = torch.finfo(x.dtype).eps * (64 if x.dtype == torch.float32 else 2)
        torch.testing.assert_close(norm.float(), with_residual * scale, rtol=budget, atol=budget)
    assert torch.equal(x, inputs[group.rank]), f"{shape}: the input changed"


def _sizes(rank: int, backend_id: str) -> str:
    """Exact at every admitted shape; says how many there were, or why there is no backend."""
    from fusewise.shape import Shape

    _, backend, reason = _build(backend_id)
    if backend is None:
        return f"skip: {reason}"
    ran, refused = 0, []
    for dtype in ("bfloat16", "float16", "float32"):
        for hidden_size in HIDDEN_SIZES:
            for num_tokens in TOKENS:
                shape = Shape(num_tokens, hidden_size, dtype)
                why = backend.admits(shape)
                if why is None:
                    _exact(backend, shape, seed=num_tokens)
                    ran += 1
                else:
                    refused.append(f"{shape}: {why}")
    # Both sides of the workspace: 4 MiB fit, one row more does not.
    assert backend.admits(Shape(1024, 2048)) is None
    _exact(backend, Shape(1023, 2048), seed=5)
    _exact(backend, Shape(1024, 2048), seed=6)
    if backend_id != "nccl":
        assert backend.admits(Shape(1025, 2048)) is not None
    backend.close()
    backend.close()
    return f"{ran} shapes, refused {len(refused)}"


def _graphs(rank: int, backend_id: str, announced: bool) -> str:
    """Replays graphs of many sizes in one random order, with new inputs all the time.

    ``announced``: the capture is wrapped in capture_begin and capture_end, as Communicator does.
    """
    from fusewise.ranks.place import shares_gpus
    from fusewise.shape import Shape

    group, backend, reason = _build(backend_id)
    if backend is None:
        return f"skip: {reason}"
    shapes = [Shape(tokens, 2048) for tokens in (1, 4, 16, 17, 128, 512, 1024)]
    shapes = [shape for shape in shapes if backend.admits(shape) is None]
    captured = [_capture(backend, shape, announced) for shape in shapes]
    order = random.Random(7)
    replays = SHARED_REPLAYS if shares_gpus() else REPLAYS
    for turn in range(replays):
        shape, graph, x, residual, total = order.choice(captured)
        inputs = _inputs(group, shape, turn)
        x.copy_(inputs[group.rank])
        graph.replay()
        expected = torch.stack(inputs).float().sum(0) + residual.float()
        wrong = int((total.float() != expected).sum())
        assert wrong == 0, f"replay {turn} of {shape}: {wrong} wrong (order seed 7)"
    backend.close()
    return f"{len(shapes)} graphs"


def _capture(backend: Any, shape: Any, announced: bool) -> tuple[Any, ...]:
    device = backend.group.device
    x, residual = _inputs(backend.group, shape, 1)
    x, residual = x.clone(), residual.clone()
    weight = torch.ones(shape.hidden_size, dtype=x.dtype, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if announced:
        backend.capture_begin()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        # A chain of two: the second call reads what the first has just written.
        _, between = backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
        _, total = backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
        total = total + 0 * between
    if announced:
        backend.capture_end()
    torch.cuda.synchronize()
    return shape, graph, x, residual, total


def _awkward(rank: int) -> str:
    """Strided and misaligned tensors through the communicator equal their contiguous copies."""
    from fusewise import Communicator

    with Communicator(timeout_s=300) as communicator:
        device = communicator.group.device
        base = torch.arange(64 * 4100, device=device) % 7 + rank
        plain = base.view(64, 4100).to(torch.bfloat16)
        for x in (plain[:, :2048], plain[::2, 1:2049], plain[:, :4096].t()[:2048, :].t()):
            expected = communicator.all_reduce(x.contiguous())
            assert torch.equal(communicator.all_reduce(x), expected)
    return "ok"


def _assert_one_answer(answers: list[str]) -> None:
    first, second = answers
    assert first == second, "ranks differ"
    if first.startswith("skip: "):
        pytest.skip(first.removeprefix("skip: "))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend_id", BACKENDS)
def test_exact_at_every_size(backend_id: str) -> None:
    _assert_one_answer(
        run_ranks(_sizes, WORLD, backend_id, device="cuda", timeout_s=BUILD_AND_RUN_S)
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("backend_id", BACKENDS)
def test_graphs_replayed_in_random_order(backend_id: str, announced: bool) -> None:
    answers = run_ranks(
        _graphs, WORLD, backend_id, announced, device="cuda", timeout_s=BUILD_AND_RUN_S
    )
    _assert_one_answer(answers)


def test_awkward_tensors() -> None:
    assert run_ranks(_awkward, WORLD, device="cuda", timeout_s=100.0) == ["ok", "ok"]
