"""The child side of ``supervisor.py``: one rank, forked by ``nursery.py``.

Gets its order, joins the group, runs the job named there and reports events as JSON lines on a
pipe. It never writes to stdout.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fusewise.errors import FusewiseError
from fusewise.ranks.place import check_interface

STALL_S = 60.0  # silence of a rank that a supervisor tolerates, unless a phase allows more
START_S = 180.0  # a CUDA context, and what a job imports from a cold disk


@dataclass
class Worker:
    """What a job knows about its rank, and how it speaks to its supervisor.

    ``device`` is torch's name of it, such as ``"cuda:0"``.
    """

    rank: int
    world_size: int
    device: str
    pipe: int

    def emit(self, kind: str, **data: Any) -> None:
        """Sends one event; ``data`` must be JSON-like."""
        line = json.dumps({"kind": kind, **data}).encode() + b"\n"
        while line:
            line = line[os.write(self.pipe, line) :]

    def phase(self, text: str, backend: str | None = None, allow_s: float = STALL_S) -> None:
        """Says what comes next, whose code it runs, and how long it may stay silent."""
        self.emit("phase", text=text, backend=backend, allow_s=allow_s)


def main(order: dict[str, Any], pipe: int) -> int:
    """Runs the order; the exit code says only whether it ended by itself."""
    os.environ.update(order["environment"])
    worker = Worker(order["rank"], order["world_size"], order["device"], pipe)
    # As torchrun has it: libraries that a rank runs, transformers for one, choose their GPU by it.
    os.environ["LOCAL_RANK"] = worker.device.partition(":")[2] or str(worker.rank)
    try:
        worker.phase("start", allow_s=START_S)
        _join(worker, order)
        module, name = order["job"].split(":")
        result = getattr(importlib.import_module(module), name)(worker, order["request"])
        worker.emit("result", value=result)
    except Exception as error:  # a rank's border: whatever it was, the supervisor must hear it
        worker.emit("error", text=f"{type(error).__name__}: {error}", code=_code(error))
        if not isinstance(error, FusewiseError):
            import traceback

            traceback.print_exc()
        return 1
    return 0


def _code(error: Exception) -> int:
    return error.exit_code if isinstance(error, FusewiseError) else 1


def _join(worker: Worker, order: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=order["timeout_s"])
    host, port = order["store"]
    store = TCPStore(host, port, is_master=False, timeout=timeout)
    device = torch.device(worker.device)
    if device.type == "cpu":
        torch.set_num_threads(order["threads"])
    else:
        torch.cuda.set_device(device)
    process_group = order["process_group"]
    if process_group == "gloo":
        check_interface()
    dist.init_process_group(
        process_group,
        store=PrefixStore("fusewise-worker", store),
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timeout,
        device_id=device if process_group == "nccl" else None,
    )
