"""All ranks or none: agreement through a store, with ranks as threads that come late or never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fusewise.ranks.group import Group
from tests.groups import StoreRanks as Ranks


def asks(value: Any = 1, **faults: str) -> Callable[[Group], None]:
    return lambda group: group.unanimous("a test", value, faults.get(f"rank{group.rank}"))


def test_all_go_ahead_once_each_has_said_the_same() -> None:
    ranks = Ranks()
    ranks.come(0, 1, 2, ask=asks({"cap": [1, 2]}))
    assert ranks.ended == dict.fromkeys(range(3), "went ahead")
    ranks.come(0, 1, 2, ask=asks((2, None)))  # a tuple is a list on the other side
    assert ranks.ended == dict.fromkeys(range(3), "went ahead")


@pytest.mark.parametrize("ill", [0, 1])
def test_a_fault_on_one_rank_is_named_on_all(ill: int) -> None:
    ranks = Ranks()
    ranks.come(0, 1, 2, ask=asks(**{f"rank{ill}": "no compiler"}))
    assert set(ranks.ended) == {0, 1, 2}
    assert all(f"rank {ill}: no compiler" in words for words in ranks.ended.values())


def test_another_opinion_is_told_rank_by_rank() -> None:
    ranks = Ranks()
    ranks.come(0, 1, 2, ask=lambda group: group.unanimous("a test", group.rank // 2))
    for words in ranks.ended.values():
        assert "rank 0 says 0; rank 1 says 0; rank 2 says 1" in words


def test_ranks_at_different_steps_do_not_go_ahead() -> None:
    ranks = Ranks(world_size=2)
    ranks.come(0, 1, ask=lambda group: group.unanimous(f"step {group.rank}", 1))
    assert "went ahead" not in ranks.ended.values()


def test_a_rank_that_comes_late_does_not_go_ahead_alone() -> None:
    ranks = Ranks(timeout_s=0.2)
    ranks.come(0, 1, ask=asks())
    assert "no answer from ranks [2]" in ranks.ended[0]
    ranks.come(2, ask=asks())
    assert ranks.ended[2] == ranks.ended[0] == ranks.ended[1]


def test_the_rank_that_judges_may_be_the_late_one() -> None:
    ranks = Ranks(timeout_s=0.1)
    ranks.come(1, 2, ask=asks())
    assert "heard nothing from rank 0" in ranks.ended[1]
    ranks.come(0, ask=asks())
    assert ranks.ended[0] == ranks.ended[1] == ranks.ended[2]


def test_a_gather_behind_it_meets_every_rank() -> None:
    ranks = Ranks()
    ranks.come(0, 1, 2, ask=asks())
    heard: dict[int, list[int]] = {}
    ranks.come(0, 1, 2, ask=lambda g: heard.update({g.rank: g.gather("next", g.rank)}))
    assert heard == {rank: [0, 1, 2] for rank in range(3)}
