"""The process that ranks are forked from: what it says when it or a rank is gone."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fusewise.errors import RankError
from fusewise.ranks.nursery import Nursery

BROKEN: dict[str, Any] = {"rank": 3}  # a rank that ends at once: its order is not whole


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


def start(nursery: Nursery, order: dict[str, Any]) -> int:
    receiver, sender = os.pipe()
    try:
        return nursery.fork(order, sender)
    finally:
        os.close(receiver)
        os.close(sender)


def test_a_rank_has_its_own_process_group_and_its_end_is_told_once_asked(
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Here, so that what is captured is what it writes to; a module that is not there ends nothing.
    with Nursery("no_such_module") as nursery:
        pid = start(nursery, BROKEN)
        assert os.getpgid(pid) == pid != nursery._process.pid
        assert nursery.wait(pid, 20) == 1
        printed = capfd.readouterr()
        assert printed.out == ""
        assert "KeyError: 'environment'" in printed.err
        assert start(nursery, BROKEN) != pid, "one broken rank does not end it"


def test_a_store_outlives_ranks_and_ends_when_it_is_killed(nursery: Nursery) -> None:
    pid, port = nursery.keep_store("127.0.0.1")
    assert nursery.wait(start(nursery, BROKEN), 20) == 1
    TCPStore("127.0.0.1", port, is_master=False).set("key", "value")
    assert TCPStore("127.0.0.1", port, is_master=False).get("key") == b"value"
    os.kill(pid, signal.SIGKILL)
    assert nursery.wait(pid, 20) == -signal.SIGKILL
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", port))


def test_a_late_answer_is_not_taken_for_the_next_ones(nursery: Nursery) -> None:
    pid = start(nursery, BROKEN)
    os.kill(nursery._process.pid, signal.SIGSTOP)  # no answer comes before it goes on
    os.waitpid(nursery._process.pid, os.WUNTRACED)
    with pytest.raises(RankError, match=r"within 0\.001 s, got none"):
        nursery._ask({"wait": pid, "timeout_s": 20}, 0.001)
    os.kill(nursery._process.pid, signal.SIGCONT)
    assert nursery.wait(pid, 20) is None, "that answer was the only one"
    assert nursery.wait(start(nursery, BROKEN), 20) == 1


def test_where_torch_cannot_be_imported_its_own_error_is_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Nursery() as nursery, pytest.raises(ImportError, match="no torch today") as raised:
        start(nursery, BROKEN)
    assert raised.value.name == "torch"


def test_a_killed_one_is_named_and_its_ranks_count_as_killed() -> None:
    with Nursery() as nursery:
        pid = start(nursery, BROKEN)
        os.kill(nursery._process.pid, signal.SIGKILL)
        nursery._process.wait()
        assert nursery.wait(pid, 20) == -signal.SIGKILL
        with pytest.raises(RankError, match=f"it ended with {-signal.SIGKILL}"):
            start(nursery, BROKEN)
