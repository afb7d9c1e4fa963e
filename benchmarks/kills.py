"""Ranks killed at random moments, many times: the others end with a named error, never wrong.

    python benchmarks/kills.py --kills 50 --out benchmarks/results/one_gpu/kills.json

Ranks are processes that share one GPU. Each builds the native backend, calls it, captures it,
replays it, closes it and starts again; one is killed (SIGKILL) somewhere in there. The others must
raise an error that names the missing rank within the bound, their results until then must be exact
or NaN, and the GPU's memory must be free afterwards. Groups run beside each other; nothing is timed
but the bound.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TIMEOUT_S = 4.0  # of every wait between ranks, on the host and on the device
BOUND_S = 3 * TIMEOUT_S + 3.0  # a wait on the device, then one on the host, on a GPU in turns
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed"])


def rank_main(rank: int, world_size: int, folder: str, seed: int, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from fusewise.ranks.place import PLACES

    faulthandler.register(signal.SIGUSR1)  # where it hangs, also with the interpreter's lock held
    os.environ.update(PLACES["shared"].environment)
    torch.set_num_threads(1)
    torch.cuda.set_device(0)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    state = {"phase": "start", "wrong": 0}
    try:
        _work(rank, seed, pipe, state)
    except Exception as error:
        pipe.send(("ended", type(error).__name__, str(error), state["phase"], state["wrong"]))
    os._exit(0)


def _work(rank: int, seed: int, pipe: Any, state: dict[str, Any]) -> None:
    import torch

    from fusewise.backends.native.strategies import OneShot
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape
    from fusewise.tune.operands import integers

    group = Group(timeout_s=60.0)
    shape = Shape(16, 2048)
    inputs = [integers(shape, r, group.device, seed) for r in range(group.world_size)]
    x, expected = inputs[rank], torch.stack(inputs).float().sum(0)
    warm = OneShot(group, shape)  # compiles; the bound is for what comes after
    group.barrier("warm")
    group.timeout_s = TIMEOUT_S
    warm.close()
    pipe.send(("ready",))

    def look(out: Any) -> None:
        torch.cuda.synchronize()
        got = out.float()
        state["wrong"] += int(((got != expected) & ~got.isnan()).sum())
        backend.check()

    while True:
        state["phase"] = "building"
        backend = OneShot(group, shape)
        state["phase"] = "eager"
        for _ in range(20):
            look(backend.all_reduce(x))
        state["phase"] = "capturing"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = backend.all_reduce(x)
        state["phase"] = "replaying"
        for _ in range(40):
            out.fill_(float("nan"))
            graph.replay()
            look(out)
        state["phase"] = "closing"
        backend.close()


def trial(index: int, seed: int) -> dict[str, Any]:
    rng = random.Random(1000 * seed + index)
    world_size = rng.choice([2, 2, 2, 4])
    victim = rng.randrange(world_size)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _CONTEXT.Process(target=rank_main, args=(r, world_size, folder, index, pipes[r][1]))
            for r in range(world_size)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _kill(index, rng, victim, processes, [receiver for receiver, _ in pipes])
        finally:
            for process in processes:
                process.kill()
                process.join()


def _kill(
    index: int, rng: random.Random, victim: int, processes: list[Any], pipes: list[Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {"kill": index, "world_size": len(processes), "victim": victim}
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(90.0):
            return row | {"verdict": f"rank {rank} was never ready"}
        first = pipe.recv()
        if first[0] != "ready":
            return row | {"verdict": f"rank {rank} before the kill: {first}"}
    time.sleep(rng.uniform(0.0, 2.5))
    os.kill(processes[victim].pid, signal.SIGKILL)
    began_s, ended = time.monotonic(), []
    for rank, pipe in enumerate(pipes):
        if rank == victim:
            continue
        left_s = BOUND_S - (time.monotonic() - began_s)
        if not pipe.poll(max(0.0, left_s)):
            os.kill(processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)
            return row | {"verdict": f"rank {rank} hangs"}
        try:
            _, kind, text, phase, wrong = pipe.recv()
        except EOFError:
            return row | {"verdict": f"rank {rank} died too"}
        ended.append({"rank": rank, "error": kind, "text": text, "phase": phase, "wrong": wrong})
    row |= {"took_s": round(time.monotonic() - began_s, 1), "ended": ended}
    if any(one["wrong"] for one in ended):
        return row | {"verdict": "finite and wrong"}
    named = any(f"rank {victim}" in one["text"] or f"[{victim}" in one["text"] for one in ended)
    return row | {"verdict": "named" if named else "raised, and named another"}


def free_bytes() -> int:
    from fusewise.node import gpu_free_bytes

    return gpu_free_bytes() or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--beside", type=int, default=4, help="groups at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="kills.json")
    arguments = parser.parse_args()
    before, rows, lock = free_bytes(), [], threading.Lock()
    from fusewise.node import probe

    def one(index: int) -> None:
        row = trial(index, arguments.seed)
        with lock:
            rows.append(row)
            phases = sorted({e["phase"] for e in row.get("ended", [])})
            print(index, row["verdict"], phases, row.get("took_s"), flush=True)
            record = {
                "command": f"python benchmarks/kills.py --kills {arguments.kills}",
                "fingerprint": probe(2, device_type="cuda", shared=True).model_dump(
                    exclude_none=True
                ),
                "bound_s": BOUND_S, "verdicts": Counter(r["verdict"] for r in rows),
                "phases": Counter(e["phase"] for r in rows for e in r.get("ended", [])),
                "free_bytes_before": before, "free_bytes_after": free_bytes(), "rows": rows,
            }  # fmt: skip
            Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")

    with ThreadPoolExecutor(arguments.beside) as pool:
        list(pool.map(one, range(arguments.kills)))
    record = json.loads(Path(arguments.out).read_text()) | {"free_bytes_after": free_bytes()}
    Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")
    print(record["verdicts"], record["phases"], before - record["free_bytes_after"], "bytes kept")


if __name__ == "__main__":
    main()
