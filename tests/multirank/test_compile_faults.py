"""What once led to a hang, to wrong numbers or to silence: two CPU ranks, Inductor itself.

One pair of ranks lives through all of it; each test looks at one part.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.compile_faults import everything
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)  # ranks compile; other suites may share the cores


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(everything, 2, str(tmp_path_factory.mktemp("faults")), timeout_s=240)


def test_an_eps_that_became_a_graph_input_is_specialised(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["eps"]) == 5
        for way, (choices, difference) in rank["eps"].items():
            graphs = 2 if way == "changed" else 1  # another eps is another graph
            assert choices == ["decide per call"] * graphs, way
            assert difference <= 1e-5, way


def test_ranks_that_would_rewrite_differently_all_leave_the_graph(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        for name in ("one rank reads more", "a cache and another graph"):
            result = rank["graphs"][name]
            assert result["choices"] == ["leave"]
            assert result["difference"] <= 1e-6
    assert ranks[0]["graphs"]["one rank reads more"]["why"] == ["the ranks' graphs differ"]
    assert ranks[1]["graphs"]["one rank reads more"]["why"] == [
        "the reduced tensor is used elsewhere"
    ]
    (warned, summary) = ranks[0]["graphs"]["one rank reads more"]["warnings"]
    assert "wait_tensor (rank 0: fuse, rank 1: leave)" in warned
    assert "0 of 1 all-reduces rewritten" in summary
    assert ranks[1]["graphs"]["one rank reads more"]["warnings"] == []


def test_a_rank_with_more_graphs_than_its_peers_waits_for_nobody(
    ranks: list[dict[str, Any]],
) -> None:
    for rank, graphs in zip(ranks, (1, 2), strict=True):
        result = rank["broken"]
        assert (result["choices"], result["graphs"]) == (["leave"] * 3, graphs)
        assert result["difference"] <= 1e-6


def test_a_cached_graph_on_one_rank_is_still_the_graph_of_all(ranks: list[dict[str, Any]]) -> None:
    for rank, hits in zip(ranks, (1, 0), strict=True):
        result = rank["graphs"]["a cache on one rank"]
        assert (result["choices"], result["hits"]) == (["fuse"], hits)
        assert result["difference"] <= 1e-5


def test_a_graph_keeps_its_communicator(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["communicators"]) == 5
        assert max(rank["communicators"].values()) <= 1e-5


def test_gradients_are_refused_and_training_is_left_alone(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in ("all_reduce", "all_reduce_rms_norm", "traced"):
            assert "have no gradient" in rank["gradients"][name]
        choices, difference = rank["gradients"]["training"]
        assert choices == ["leave", "leave"]  # forward and backward
        assert difference <= 1e-6


def test_the_log_says_what_was_done_and_what_was_not(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["said"]["rewritten"][-1].endswith("graph 0: 1 of 1 all-reduces rewritten")
    nothing = ranks[0]["said"]["nothing"][-1]
    assert nothing.startswith("WARNING graph 0: 0 of 1 all-reduces rewritten; 1 left: no RMSNorm")
    assert "nothing was compiled" in ranks[0]["said"]["unused"][-1]


def test_own_methods_can_be_compiled_and_exported(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["traced"] == {"compiled": 0.0, "exported": 0.0}
