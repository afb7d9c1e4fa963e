"""Real ranks for tests: started once per call, over gloo or NCCL, always bounded and reaped.

On GPUs: one per rank where there are as many, else the ranks share what there is.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusewise.node import gpu_count
from fusewise.ranks.place import PLACES, place_for

# Ranks are forked from a server that has imported torch and has no threads and no CUDA context:
# Inductor, which may ask CUDA while it loads, is there only where there is no GPU.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed",
        "fusewise.run.operators",
        *([] if gpu_count() else ["torch._inductor.compile_fx"]),
        "tests.frozen",
    ]
)


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    sender: Any,
    args: Any,
    device: str,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["FUSEWISE_HOME"] = str(Path(folder) / "home")
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    place = PLACES["cpu"] if device == "cpu" else place_for(world_size, share=True)
    os.environ.update(place.environment)
    here = torch.device(place.device(rank))
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group(
        place.process_group,
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=here if place.kind == "cuda" else None,
    )
    try:
        sender.send(("ok", function(rank, *args)))
    except BaseException as error:  # the parent re-raises it with the rank's name
        sender.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        sender.close()
        if world_size > 1:
            dist.destroy_process_group()


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    device: str = "cpu",
) -> list[Any]:
    """``function(rank, *args)`` on ``world_size`` ranks; their results in rank order.

    ``function`` must be importable by name. A rank's exception becomes an AssertionError here.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _CONTEXT.Process(
                target=_rank_main,
                args=(function, rank, world_size, folder, sender, args, device),
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(pipes, processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: Any, processes: Any, deadline: float) -> list[Any]:
    results: list[Any] = []
    for rank, ((receiver, sender), process) in enumerate(zip(pipes, processes, strict=True)):
        sender.close()
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"rank {rank} gave no result in time (exit {process.exitcode})")
        try:
            kind, value = receiver.recv()
        except EOFError:
            raise AssertionError(f"rank {rank} died with {process.exitcode}") from None
        assert kind == "ok", f"rank {rank}: {value}"
        results.append(value)
    for process in processes:
        process.join(timeout=10)
    return results


def run_script(
    script: Path, *words: str, stdin: str, environ: dict[str, str], timeout_s: float = 110.0
) -> str:
    """What a script prints: run as one, but forked from the server, so that torch is there.

    ``environ`` is all of its environment; ``PYTHONPATH`` there goes first, as always. A script that
    fails, or does not end in time, becomes an AssertionError with the end of its stderr.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "0").write_text(stdin)
        process = _CONTEXT.Process(target=_script_main, args=(script, words, environ, folder))
        process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        said = (folder / "2").read_text()[-3000:] if (folder / "2").exists() else ""
        assert process.exitcode == 0, f"{script.name} ended with {process.exitcode}: {said}"
        return (folder / "1").read_text()


def run_torchrun(*words: str, environ: dict[str, str]) -> str:
    """What ``torchrun`` and its ranks print; they are new interpreters, as always."""
    import torch.distributed

    script = Path(torch.distributed.__file__).with_name("run.py")
    return run_script(script, *words, stdin="", environ=environ)


def _script_main(
    script: Path, words: tuple[str, ...], environ: dict[str, str], folder: Path
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environ)
    for number, flags in enumerate(
        (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    ):
        opened = os.open(folder / str(number), flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  multiprocessing gave it /dev/null
    torch.set_num_threads(1)
    path = environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(script.parent), *filter(None, path)]
    importlib.invalidate_caches()
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")
