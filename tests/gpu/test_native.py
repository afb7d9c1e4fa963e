"""The native backends on two ranks, a GPU each or sharing one: bits, graphs, memory."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
import torch

from fusewise.backends.native.cuda.build import missing_compiler
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(missing_compiler() is not None, reason='needs pip install "fusewise[cuda]"'),
    pytest.mark.timeout(600),
]

WORLD = 2
REPLAYS = 10_000
HIDDEN_SIZES = (8, 264, 2048, 2880, 3584, 4096, 5120, 7168, 8192)
TOKENS = (*range(1, 18), 31, 127, 509)


def _backend(timeout_s: float = 60.0, max_tokens: int = 16384) -> Any:
    from fusewise.backends.native.strategies import OneShot
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

    return OneShot(Group(timeout_s=timeout_s), Shape(max_tokens, 2048))


def _operands(backend: Any, shape: Any, seed: int, whole: bool) -> tuple[Any, Any, Any, Any]:
    """This rank's x, everybody's x, a residual and a weight; whole numbers or normals."""
    from fusewise.tune.operands import dtype_of

    generator = torch.Generator().manual_seed(seed)
    size = (1 + WORLD, shape.num_tokens, shape.hidden_size)
    if whole:
        values = torch.randint(-8, 9, size, generator=generator).float()
    else:
        values = torch.randn(size, generator=generator)
    weight = torch.randn(shape.hidden_size, generator=generator)
    device, dtype = backend.group.device, dtype_of(shape)
    everyone = values[:WORLD].to(device, dtype)
    residual = values[WORLD].to(device, dtype)
    return everyone[backend.group.rank], everyone, residual, weight.to(device, dtype)


def _poison() -> None:
    """Leaves NaN in the memory that the next results are made of."""
    for size in (2**16, 2**20, 2**22):
        torch.full((size,), float("nan"), device="cuda")


def _all_shapes(rank: int, dtype: Any) -> str:
    """Exact sums, norms within budget; a digest of all bits, to compare the ranks."""
    from fusewise.shape import Shape

    backend = _backend()
    digest = hashlib.sha256()
    for hidden_size in HIDDEN_SIZES:
        for num_tokens in TOKENS:
            shape = Shape(num_tokens, hidden_size, dtype)
            x, everyone, residual, weight = _operands(backend, shape, num_tokens, whole=True)
            expected = everyone.double().sum(0) + residual.double()
            for bias in (0.0, 1.0):
                _poison()
                norm, total = backend.all_reduce_rms_norm(x, residual, weight, 1e-6, bias)
                assert torch.equal(total.double(), expected), str(shape)
                scale = torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1e-6)
                reference = expected * scale * (weight.double() + bias)
                slack = torch.finfo(x.dtype).eps * (8 if dtype == "float32" else 1)
                torch.testing.assert_close(norm.double(), reference, rtol=slack, atol=slack)
                digest.update(norm.cpu().view(torch.uint8).numpy().tobytes())
            norm, bare = backend.all_reduce_rms_norm(x, None, weight, 1e-6)
            assert torch.equal(bare.double(), everyone.double().sum(0)), str(shape)
            assert torch.equal(backend.all_reduce(x), bare), str(shape)
    backend.check()
    backend.close()
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_exact_sums_and_the_same_bits_on_both_ranks(dtype: str) -> None:
    first, second = run_ranks(_all_shapes, WORLD, dtype, device="cuda", timeout_s=300.0)
    assert first == second


def _large(rank: int, num_tokens: int) -> str:
    from fusewise.shape import Shape

    backend = _backend(max_tokens=16384)
    shape = Shape(num_tokens, 2048)
    x, everyone, residual, weight = _operands(backend, shape, 1, whole=True)
    for _ in range(3):
        _, total = backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total.float(), everyone.float().sum(0) + residual.float())
    backend.close()
    return "ok"


@pytest.mark.parametrize("num_tokens", [8192, 16384])
def test_large_messages(num_tokens: int) -> None:
    assert run_ranks(_large, WORLD, num_tokens, device="cuda", timeout_s=100.0) == ["ok", "ok"]


def _chain(rank: int) -> str:
    """Dependent launches right behind each other: each call reads what the last one wrote."""
    from fusewise.shape import Shape

    backend = _backend()
    for num_tokens in range(1, 18):
        shape = Shape(num_tokens, 2048)
        x, _, residual, weight = _operands(backend, shape, num_tokens, whole=False)
        alone = x.clone(), residual.clone()
        for _ in range(8):  # one call at a time
            alone = backend.all_reduce_rms_norm(*alone, weight, 1e-6)
            torch.cuda.synchronize()
        _poison()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            chained = x, residual
            for _ in range(8):
                chained = backend.all_reduce_rms_norm(*chained, weight, 1e-6)
            behind = chained[0] * 1.0
        for _ in range(50):
            behind.fill_(float("nan"))
            graph.replay()
            assert torch.equal(behind, alone[0]), f"{num_tokens} tokens"
            assert torch.equal(chained[1], alone[1]), f"{num_tokens} tokens"
    backend.close()
    return "ok"


def test_a_chain_of_dependent_launches_equals_one_call_at_a_time() -> None:
    assert run_ranks(_chain, WORLD, device="cuda", timeout_s=200.0) == ["ok", "ok"]


def _replays(rank: int) -> str:
    """Graphs of many shapes in one random order, an eager call now and then."""
    from fusewise.shape import Shape

    backend = _backend()
    rng = random.Random(5)
    shapes = [Shape(t, h) for t, h in ((1, 2048), (3, 7168), (17, 2880), (64, 4096), (700, 2048))]
    made = []
    for shape in shapes:
        x, everyone, residual, weight = _operands(backend, shape, 3, whole=True)
        backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            _, total = backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
        inputs = x, residual, weight  # graphs read them at every replay
        made.append((graph, total, everyone.float().sum(0) + residual.float(), inputs))
    for step in range(REPLAYS):
        graph, total, expected, (x, *_) = rng.choice(made)
        checked = step % 50 == 0
        if checked:
            total.fill_(float("nan"))
        graph.replay()
        if checked:
            assert torch.equal(total.float(), expected), f"replay {step}"
            assert torch.equal(backend.all_reduce(x), backend.all_reduce(x))
    backend.check()
    backend.close()
    return "ok"


def test_ten_thousand_replays_in_random_order_of_shapes() -> None:
    assert run_ranks(_replays, WORLD, device="cuda", timeout_s=300.0) == ["ok", "ok"]


def _streams(rank: int) -> str:
    """Calls that change streams without a word stay in order."""
    from fusewise.shape import Shape

    backend = _backend()
    x, everyone, _, _ = _operands(backend, Shape(512, 2048), 2, whole=True)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for i in range(300):
        with torch.cuda.stream(streams[(i * (rank + 1)) % 3]):
            results.append(backend.all_reduce(x))
    torch.cuda.synchronize()
    expected = everyone.float().sum(0)
    assert all(torch.equal(result.float(), expected) for result in results)
    backend.close()
    return "ok"


def test_calls_on_changing_streams() -> None:
    assert run_ranks(_streams, WORLD, device="cuda", timeout_s=100.0) == ["ok", "ok"]


def _one_fails(rank: int, step: str) -> str:
    """A rank whose step throws: all ranks get an error, at once, and can build again."""
    from fusewise.backends.native import workspace
    from fusewise.errors import UnavailableError

    kept = getattr(workspace, step)

    def refuse(*arguments: Any) -> Any:
        raise PermissionError("refused on purpose")

    if rank == 1:
        setattr(workspace, step, refuse)
    try:
        _backend(timeout_s=20.0)
    except UnavailableError as error:
        said = str(error)
    setattr(workspace, step, kept)
    _backend(timeout_s=60.0).close()
    return said


def test_a_rank_that_cannot_allocate_fails_all_and_they_recover() -> None:
    for said in run_ranks(_one_fails, WORLD, "symmetric_bytes", device="cuda", timeout_s=100.0):
        assert "rank 1: PermissionError: refused on purpose" in said


def _memory(rank: int) -> int:
    """Bytes that ten builds and closes leave behind on the device, the least of three times: what
    others take meanwhile, such as tests beside this one, looks the same."""
    kept = []
    for _ in range(3):
        before = _free_bytes(_backend())
        for _ in range(9):
            _backend().close()
        kept.append(before - _free_bytes(_backend()))
    return min(kept)


def _free_bytes(backend: Any) -> int:
    """Free bytes once the backend is closed on all ranks: a peer's mapping keeps the memory too."""
    backend.close()
    backend.group.barrier("closed")
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def test_closing_gives_the_memory_back() -> None:
    # One workspace is near 140 MiB; what stays may be the driver's own bookkeeping.
    assert max(run_ranks(_memory, WORLD, device="cuda", timeout_s=200.0)) < 32 * 2**20


def _fp8(rank: int) -> str:
    from fusewise.backends.native.fp8 import Fp8, quantise
    from fusewise.shape import Shape

    backend = _backend()
    one = torch.full((1,), 0.02, device=backend.group.device)
    for hidden_size in (2048, 2880, 7168):
        for scaling in ("static", "token", "group"):
            shape = Shape(17, hidden_size)
            x, _, residual, weight = _operands(backend, shape, 4, whole=False)
            static = one if scaling == "static" else None
            plain, _ = backend.all_reduce_rms_norm(x, residual, weight, 1e-6)
            for keep in (True, False):
                fp8 = Fp8(scaling, keep)
                got = backend.all_reduce_rms_norm_fp8(
                    x, residual, weight, 1e-6, fp8, static_scale=static
                )
                values, scales = quantise(plain, fp8, static)
                assert torch.equal(got.quantised.view(torch.uint8), values.view(torch.uint8))
                assert torch.equal(got.scales, scales)
                assert got.norm is None or torch.equal(got.norm, plain)
    backend.close()
    return "ok"


def test_fp8_outputs_equal_a_quantiser_of_the_norm() -> None:
    assert run_ranks(_fp8, WORLD, device="cuda", timeout_s=100.0) == ["ok", "ok"]
