"""Before a machine is measured: one measurement at a time, and a word if others use it.

Never measures and never decides; two tunes at once would each take the other for a slow node.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import typer

from fusewise.commands.output import check_stdout
from fusewise.errors import UnavailableError
from fusewise.profiles import private
from fusewise.profiles.variables import path_of
from fusewise.ranks.teams import under_torchrun

# In the folder all users of a machine share; containers that do not share it do not see each other.
_LOCK = "/tmp/fusewise-measuring.lock"
_WAIT_S = 600.0
_TORCHRUN_WAIT_S = 60.0  # the other ranks wait for this one no longer than two minutes
_SAMPLE_S = 0.2
_BUSY_SHARE = 0.2  # of all cores; below it, the interpreter that asks is itself a part
_BUSY_GPU_PERCENT = 5


@contextmanager
def alone() -> Iterator[None]:
    """Waits until nobody else measures this machine, then keeps others waiting.

    Under torchrun one process of each host does so for all of them.

    Raises:
        UnavailableError: another measurement did not end in time, or nobody hears what is measured.
    """
    check_stdout()
    if under_torchrun() and os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    file = path_of(os.environ.get("FUSEWISE_MEASURING_LOCK") or _LOCK)
    wait_s = _TORCHRUN_WAIT_S if under_torchrun() else _WAIT_S
    with _lock(file, wait_s):
        for line in busy():
            typer.echo(f"fusewise: warning: {line}", err=True)
        yield


@contextmanager
def _lock(file: Path, wait_s: float) -> Iterator[None]:
    with ExitStack() as held:
        _take(held, file, wait_s)
        yield


def _take(held: ExitStack, file: Path, wait_s: float) -> None:
    """Enters the lock into ``held``."""
    try:
        if held.enter_context(private.try_lock(file, 0.0)):
            return
        who = _holder(file)
        typer.echo(
            f"fusewise: another fusewise{who} is measuring this machine; waiting up to "
            f"{wait_s / 60:g} min for it to end",
            err=True,
        )
        if not held.enter_context(private.try_lock(file, wait_s)):
            raise UnavailableError(
                f"another fusewise{who} is still measuring this machine",
                hint="Two at once would disturb each other. Run this again when it has ended.",
            )
    except OSError as error:
        raise UnavailableError(
            f"cannot lock {file}",
            got=str(error.strerror),
            hint="Name another file with FUSEWISE_MEASURING_LOCK.",
        ) from error


def _holder(file: Path) -> str:
    """`` (process 1234)``, as far as the kernel's list of locks tells."""
    try:
        inode = str(file.stat().st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                return f" (process {words[4]})"
    except OSError:
        pass
    return ""


def busy() -> list[str]:
    """Who else uses this machine, a line each; empty on a quiet one."""
    share = _cpu_share()
    lines = []
    if share > _BUSY_SHARE:
        lines.append(
            f"the CPUs are {share:.0%} busy with other work; times will scatter, and less may be "
            "decided"
        )
    return lines + _busy_gpus()


def _cpu_share() -> float:
    """The share of all cores' time that was not idle in the last moment."""
    before = _cpu_ticks()
    time.sleep(_SAMPLE_S)
    after = _cpu_ticks()
    total = sum(after) - sum(before)
    idle = sum(after[3:5]) - sum(before[3:5])
    return 1 - idle / total if total > 0 else 0.0


def _cpu_ticks() -> list[int]:
    """user, nice, system, idle, iowait, … since boot, as proc(5) orders them."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return [0] * 5
    return [int(word) for word in line.split()[1:9]]


def _busy_gpus() -> list[str]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, no permission: no GPU to be busy
        return []
    lines = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            percent = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            if percent > _BUSY_GPU_PERCENT:
                lines.append(f"GPU {index} is {percent} % busy with other work")
    except pynvml.NVMLError:  # partitioned GPUs do not tell
        pass
    finally:
        pynvml.nvmlShutdown()
    return lines
