"""Jobs that misbehave, run inside real worker processes."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from fusewise.backends import registry, steps
from fusewise.backends.base import Backend
from fusewise.backends.shm import OneShot as Shm
from fusewise.errors import UnavailableError
from fusewise.profiles.schema import Numerics
from fusewise.ranks.worker import Worker
from fusewise.tune import job, stack


def misbehave(worker: Worker, request: dict[str, Any]) -> str:
    """Rank 1 does what ``request["how"]`` says; the others return after a while."""
    if worker.rank != 1:
        worker.phase("wait", allow_s=30)
        if request["how"] == "late":
            raise UnavailableError("my peer is gone")
        time.sleep(0.3 if request["how"] == "return" else 20)
        return f"done as local rank {os.environ['LOCAL_RANK']}"
    worker.phase("misbehave", "backend.x", allow_s=1.0)
    if request["how"] == "return":
        print("chatter on stdout")
        return f"done as local rank {os.environ['LOCAL_RANK']}"
    if request["how"] == "late":
        time.sleep(0.2)
    if request["how"] in ("crash", "late"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if request["how"] == "raise":
        raise UnavailableError("no such thing", hint="Do this.")
    while True:  # spin, silently
        pass


class _Fake(Backend):
    provider = "fake"
    fused = True
    numerics = Numerics(accumulation="float32", order="rank", rounds_sum=False)

    @classmethod
    def available(cls, node: Any) -> str | None:
        return None

    def all_reduce(self, x: Any) -> Any:
        raise AssertionError("never called")


class Crashes(_Fake):
    """Takes rank 1 down while it is built."""

    id = "fake.crashes"

    def __init__(self, group: Any, max_shape: Any) -> None:
        super().__init__(group, max_shape)
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)


class Spins(_Fake):
    """Builds well and never returns from its first call on rank 1.

    As silent as a loop without a pause, which ``misbehave`` has, and leaves its core to others.
    """

    id = "fake.spins"

    def all_reduce_rms_norm(self, x: Any, *rest: Any) -> Any:  # type: ignore[override]
        while self.group.rank == 1:
            time.sleep(0.01)
        return x, x


class FailsToBuild(_Fake):
    """Raises on rank 1 only, after rank 0 has built its half."""

    id = "fake.fails"

    def __init__(self, group: Any, max_shape: Any) -> None:
        super().__init__(group, max_shape)
        if group.rank == 1:
            raise RuntimeError("out of handles")


class Differs(Shm):
    """Right within the budget on each rank, and not the same bits on both."""

    id = "fake.differs"

    def all_reduce_rms_norm(self, x: Any, *rest: Any) -> Any:  # type: ignore[override]
        out, total = super().all_reduce_rms_norm(x, *rest)
        return (out * (1 + 0.004 * self.group.rank)).to(out.dtype), total


class Lies(Shm):
    """Passes its examination and is wrong in one element from 18 tokens on."""

    id = "fake.lies"

    def all_reduce_rms_norm(self, x: Any, *rest: Any) -> Any:  # type: ignore[override]
        out, total = super().all_reduce_rms_norm(x, *rest)
        if x.shape[0] > 17:
            out[-1, -1] += 1
        return out, total


FAKES: dict[str, type[Backend]] = {
    fake.id: fake for fake in (Crashes, Spins, FailsToBuild, Differs, Lies)
}


def tune_with_fakes(worker: Worker, request: dict[str, Any]) -> str | None:
    """The real tune with five more candidates, each bad in its own way."""
    _with_fakes(worker)
    return job.tune_rank(worker, request)


def verify_with_fakes(worker: Worker, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The real verification with the same candidates."""
    _with_fakes(worker)
    return stack.verify_rank(worker, request)


def _with_fakes(worker: Worker) -> None:
    real_class, real_phase = registry.backend_class, worker.phase

    def backend_class(backend_id: str) -> type[Backend]:
        return FAKES.get(backend_id) or real_class(backend_id)

    def phase(text: str, backend: str | None = None, allow_s: float = 60.0) -> None:
        real_phase(text, backend, 5.0 if backend == Spins.id else allow_s)

    registry._CPU.update(dict.fromkeys(FAKES, "fakes:none"))
    steps.backend_class = backend_class
    worker.phase = phase  # type: ignore[method-assign]
