"""Progress on stderr: a bar on a terminal, a line per step elsewhere. Never on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusewise.tune.supervise import Listener

_QUIET_S = 5.0  # between two progress lines in a log


@contextmanager
def progress(title: str) -> Iterator[Listener]:
    """A listener for a tune's events that shows them while the block runs."""
    if sys.stderr.isatty():
        with _bar(title) as listen:
            yield listen
    else:
        yield _Log(title)


@contextmanager
def _bar(title: str) -> Iterator[Listener]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, step="starting ranks")

        def listen(event: dict[str, Any]) -> None:
            if event["kind"] == "progress":
                step = f"{event['op']} {event['shape']}"
                bar.update(task, total=event["planned"], completed=event["done"], step=step)
            else:
                bar.console.print(_line(event), highlight=False, markup=False)

        yield listen


class _Log:
    def __init__(self, title: str) -> None:
        self.title, self._last_s = title, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "progress":
            now = time.monotonic()
            if now - self._last_s < _QUIET_S:
                return
            self._last_s = now
        print(f"fusewise: {self.title}: {_line(event)}", file=sys.stderr, flush=True)


def _line(event: dict[str, Any]) -> str:
    if event["kind"] == "progress":
        return f"{event['done']}/{event['planned']} {event['op']} {event['shape']}"
    if event["kind"] == "ready":
        return f"{event['path']} verified"
    return f"{event['backend']} left out: {event['reason']}"
