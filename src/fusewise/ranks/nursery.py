"""One process that has imported torch, and forks ranks from it for as long as it lives.

Importing torch takes seconds of a core. With this it is done once for all ranks of this host and
all attempts of a command, instead of once per rank and attempt. The process imports torch and
what its starter names, and nothing else: it runs no operator, touches no GPU and starts no threads
(OpenBLAS, which numpy brings, keeps one that looks after forks itself), so that what it forks is as
clean as a new interpreter. It ends with the one that started it, and its children with it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from fusewise.errors import RankError
from fusewise.ranks import worker

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h
_START_S = 180.0  # an interpreter and torch, on a cold disk
_SLACK_S = 10.0  # a fork, and an answer on a busy host
_POLL_S = 0.01
_MESSAGE_BYTES = 4096
_NEW_OBJECTS = 50_000  # between collections; with the usual 700 they are a tenth of a compilation


class Nursery:
    """The process, as a supervisor sees it; started at once, ready when it first answers.

    Use it as a context manager: leaving it ends the process and whatever it forked.

    Args:
        modules: imported there besides torch, where they can be. None of them may touch a GPU.
    """

    def __init__(self, *modules: str) -> None:
        self._asked = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fusewise.ranks.nursery", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for data; a provider's chatter is not
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which then reaps
            )

    def fork(self, order: dict[str, Any], pipe: int) -> int:
        """Starts a rank; its process id, which is also that of its process group.

        Args:
            order: JSON-like; see ``worker.main``.
            pipe: where the rank reports events; the caller closes its own copy.

        Raises:
            RankError: the process ended, or did not answer in time.
            ImportError: torch's own.
        """
        paper = os.memfd_create("order")  # no bound on its size, and nobody waits for a reader
        try:
            with open(paper, "wb", closefd=False) as file:
                file.write(json.dumps(order).encode())
            answer = self._ask({"fork": order["rank"]}, _START_S, [paper, pipe])
        finally:
            os.close(paper)
        return int(answer["pid"])

    def keep_store(self, host: str) -> tuple[int, int]:
        """Starts a process that is a TCPStore's server until it is killed: its id, and the port.

        No rank's end takes it along.

        Raises:
            RankError: it cannot listen at ``host``; or as ``fork``.
        """
        answer = self._ask({"store": host}, _START_S)
        if not answer["port"]:
            self.wait(answer["pid"], _SLACK_S)
            raise RankError(f"no rendezvous at {host}", hint="Its own output says why.")
        return int(answer["pid"]), int(answer["port"])

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """How a rank ended: its exit code, or a signal's number below zero; None if it has not."""
        try:
            code = self._ask({"wait": pid, "timeout_s": timeout_s}, timeout_s + _SLACK_S)["code"]
        except RankError:
            return -signal.SIGKILL  # what its children die of when the nursery does
        return None if code is None else int(code)

    def _ask(self, request: dict[str, Any], timeout_s: float, fds: list[int] | None = None) -> Any:
        self._asked += 1  # an interrupted question leaves its answer behind
        message = json.dumps(request | {"number": self._asked}).encode()
        self._socket.settimeout(timeout_s)
        with suppress(OSError):
            socket.send_fds(self._socket, [message], fds or [])
            while received := self._socket.recv(_MESSAGE_BYTES):
                answer = json.loads(received)
                if "torch" in answer:
                    raise ImportError(answer["torch"], name="torch")
                if answer["number"] == self._asked:
                    return answer
        with suppress(subprocess.TimeoutExpired):  # it closes its socket before it is gone
            self._process.wait(timeout=1)
        code = self._process.poll()
        raise RankError(
            "the process that starts ranks",
            expected=f"an answer within {timeout_s:g} s",
            got="none" if code is None else f"it ended with {code}",
            hint="Its own output says why; `python -c 'import torch'` must work.",
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *details: object) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _bind_to_parent(parent: int) -> None:
    """Has this process killed as soon as its parent is gone; at once if that is so already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before prctl could tell
        os._exit(1)


def main(handle: int, modules: list[str]) -> None:
    """Serves one supervisor until it closes its end: forks a process, or waits for one."""
    with socket.socket(fileno=handle) as supervisor:
        gc.disable()  # modules are not garbage; collecting among them is a tenth of the start
        try:
            import torch.distributed  # noqa: F401
        except (ImportError, OSError) as error:
            # Closing a socket on an unread question would drop the answer.
            supervisor.recv(_MESSAGE_BYTES)
            supervisor.send(json.dumps({"torch": str(error)}).encode())
            return
        for name in modules:
            with suppress(ImportError, OSError):  # a rank that needs it will say so
                importlib.import_module(name)
        gc.freeze()  # no rank's collector walks what is here by now
        gc.set_threshold(_NEW_OBJECTS)
        gc.enable()
        while True:
            message, fds, _, _ = socket.recv_fds(supervisor, _MESSAGE_BYTES, 2)
            if not message:
                return
            request = json.loads(message)
            answer: dict[str, int | None] = {"number": request["number"]}
            if "fork" in request:
                run = functools.partial(_rank, request["fork"], *fds)
                answer["pid"] = _forked(run, supervisor)
            elif "store" in request:
                answer["pid"], answer["port"] = _store(request["store"], supervisor)
            else:
                answer["code"] = _code_of(request["wait"], request["timeout_s"])
            for fd in fds:
                os.close(fd)
            supervisor.send(json.dumps(answer).encode())


def _forked(run: Callable[[], int], supervisor: socket.socket) -> int:
    here = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with suppress(OSError):  # both sides do it: whichever comes first
                os.setpgid(0, 0)
            _bind_to_parent(here)
            supervisor.close()
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            # Skips the interpreter's teardown: a backend whose peer died may block in its
            # destructor.
            os._exit(code)
    with suppress(OSError):
        os.setpgid(pid, pid)
    return pid


def _rank(rank: int, paper: int, pipe: int) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"fusewise-rank{rank}".encode())
    order = json.loads(os.pread(paper, os.fstat(paper).st_size, 0))
    return worker.main(order, pipe)


def _store(host: str, supervisor: socket.socket) -> tuple[int, int]:
    """The process and the port; 0 where it could not listen."""
    receiver, sender = os.pipe()

    def keep() -> int:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        patience = timedelta(seconds=_SLACK_S)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        os.write(sender, str(store.port).encode())
        while True:
            signal.pause()

    pid = _forked(keep, supervisor)
    os.close(sender)
    port = os.read(receiver, 16)  # empty where it ended
    os.close(receiver)
    return pid, int(port or 0)


def _code_of(pid: int, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # an earlier question learned it, and was interrupted
            return None
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_S)


if __name__ == "__main__":
    _bind_to_parent(os.getppid())
    main(int(sys.argv[1]), sys.argv[2:])
