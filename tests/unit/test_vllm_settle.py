"""Workers agree before anything is set: on all ranks or on none, and nobody decides there."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm import settle
from fusewise.engines.vllm.mark import Mark
from tests.groups import StoreRanks
from tests.vllm_fakes import Rank

CAP = Mark("cap", cap_mb=4.0, table=True, fuses=True)
ALONE = replace(CAP, alone=True, endpoints=[100])
BEFORE = (64, None, [100, 8192])


class Workers(StoreRanks):
    """Ranks as threads; each has a table, as each worker's process has."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *given: Mark, timeout_s: float = 20.0
    ) -> None:
        super().__init__(len(given), timeout_s)
        self.workers = [Rank(mark) for mark in given]
        self._here = threading.local()
        self.blind: set[int] = set()
        monkeypatch.setattr("fusewise.ranks.group.Group", lambda group, timeout_s: group)
        monkeypatch.setattr(settle, "_lowered", {})
        monkeypatch.setattr(settle, "_row", self._row)

    def _row(self) -> tuple[int, dict[int, float]]:
        if self._here.rank in self.blind:
            raise ImportError("no table")
        return self._here.rank, self.workers[self._here.rank].table

    def settle(self, *ranks: int) -> None:
        self.come(*ranks, ask=self._ask)

    def _ask(self, group: Any) -> None:
        self._here.rank = group.rank
        config = self.workers[group.rank].config
        mark = marks.read(config)
        assert mark is not None
        settle.settled(group, config, mark)

    @property
    def states(self) -> list[tuple[float, float | None, list[int]]]:
        return [worker.state for worker in self.workers]


def test_all_lower_their_tables_together(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch, CAP, CAP)
    workers.settle(0, 1)
    assert workers.ended == {0: "went ahead", 1: "went ahead"}
    assert workers.states == [(4, None, [100, 8192])] * 2  # the field came with the config


def test_ranks_that_built_their_own_configs_set_the_cap_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(monkeypatch, ALONE, ALONE)
    workers.settle(0, 1)
    assert workers.states == [(4, 4.0, [100, 1024, 8192])] * 2


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(ALONE, cap_mb=8.0), "rank 1 says cap, 8 MB, pass and table"),
        (Mark(alone=True), "rank 1 says nothing"),
        (replace(ALONE, mode="full", wide_mb=16.0), "rank 1 says full, 4 MB, then 16 MB"),
        (Mark(alone=True, fault="the node could not be probed"), "could not be probed"),
    ],
)
def test_ranks_of_different_opinion_all_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch, other: Mark, words: str
) -> None:
    workers = Workers(monkeypatch, ALONE, other)
    workers.settle(0, 1)
    assert workers.states == [BEFORE] * 2
    assert all(words in told for told in workers.ended.values())


def test_a_rank_without_the_plugin_leaves_all_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch, CAP, CAP, timeout_s=0.2)
    workers.settle(0)
    assert "no answer from ranks [1]" in workers.ended[0]
    workers.settle(1)  # it was only late
    assert workers.ended[1] == workers.ended[0]
    assert workers.states == [BEFORE] * 2


def test_a_table_one_rank_cannot_find_stays_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch, CAP, CAP)
    workers.blind.add(1)
    workers.settle(0, 1)
    assert workers.states == [BEFORE] * 2
    assert "rank 1: ImportError: no table" in workers.ended[0]


def test_users_caps_on_all_ranks_are_nothing_to_talk_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(monkeypatch, Mark(alone=True), Mark(alone=True))
    workers.settle(0, 1)
    assert workers.ended == {0: "went ahead", 1: "went ahead"}
    assert workers.states == [BEFORE] * 2


def test_the_next_engine_of_a_process_finds_vllms_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {90: {2: 64.0, 8: 0.5}}
    monkeypatch.setattr(settle, "resolve", lambda seam: table)
    monkeypatch.setattr(settle, "_lowered", {})
    for cap_mb in (8.0, 4.0):
        settle._lower((90, table[90]), 2, cap_mb)
    assert table == {90: {2: 4.0, 8: 0.5}}
    settle.restore_table()
    assert table == {90: {2: 64.0, 8: 0.5}}
