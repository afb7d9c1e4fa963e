"""A peer that stays away from our kernels: named within the bound, in calls and in replays."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from fusewise.backends.native.cuda.build import missing_compiler
from fusewise.backends.native.watchdog import REPLAY_TIMEOUT
from tests.gpu.test_native import _backend as backend_of
from tests.gpu.test_native import _operands as operands_of
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(missing_compiler() is not None, reason='needs pip install "fusewise[cuda]"'),
    pytest.mark.timeout(300),
]


def _missing(rank: int) -> str:
    """Rank 1 makes no call: rank 0 names it, gives NaN and refuses from then on."""
    from fusewise.errors import RankTimeoutError
    from fusewise.shape import Shape

    backend = backend_of(timeout_s=20.0)
    backend.group.timeout_s = 2.0
    x, *_ = operands_of(backend, Shape(4, 2048), 2, whole=True)
    said = ""
    if rank == 0:
        out = backend.all_reduce(x)
        torch.cuda.synchronize()
        assert out.isnan().all()
        try:
            backend.all_reduce(x)
        except RankTimeoutError as error:
            said = str(error)
    backend.group.timeout_s = 20.0
    backend.group.barrier("rank 0 has waited")
    backend.close()
    return said


def test_a_missing_rank_is_named_within_the_bound() -> None:
    said, _ = run_ranks(_missing, 2, device="cuda", timeout_s=100.0)
    assert "for rank 1" in said and "rank 0 waited at row" in said


def _missing_in_replays(rank: int) -> tuple[str, str]:
    """Rank 1 stops replaying: rank 0 hears it from the watchdog, without a call, in seconds."""
    from fusewise.errors import RankTimeoutError
    from fusewise.shape import Shape

    os.environ[REPLAY_TIMEOUT] = "1"
    backend = backend_of(timeout_s=60.0)
    heard, told = threading.Event(), []

    def tell(error: Exception) -> None:
        told.append(str(error))
        heard.set()

    backend.on_death(tell)
    x, *_ = operands_of(backend, Shape(4, 2048), 2, whole=True)
    backend.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = backend.all_reduce(x)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    backend.check()
    said = ""
    if rank == 0:
        graph.replay()
        assert heard.wait(30.0), "the watchdog said nothing"
        torch.cuda.synchronize()
        assert out.isnan().all()
        try:
            backend.all_reduce(x)
        except RankTimeoutError as error:
            said = str(error)
    backend.group.barrier("rank 0 has waited")
    backend.close()
    return "".join(told), said


def test_a_rank_missing_in_replays_is_seen_by_the_watchdog() -> None:
    first, second = run_ranks(_missing_in_replays, 2, device="cuda", timeout_s=150.0)
    assert "for rank 1" in first[0] and "in a graph 1 s" in first[0]
    assert first[1] == first[0]
    assert second == ("", "")
