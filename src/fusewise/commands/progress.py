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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
               TextColumn("{task.fields[step]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, step="starting ranks")
        clock = _Clock()

        def listen(event: dict[str, Any]) -> None:
            if event["kind"] == "progress":
                step = f"{event['op']} {event['shape']}{clock.left(event)}"
                bar.update(task, total=event["planned"], completed=event["done"], step=step)
            elif (line := _line(event)) is not None:
                bar.console.print(line, highlight=False, markup=False)

        yield listen


class _Log:
    def __init__(self, title: str) -> None:
        self.title, self._last_s, self._clock = title, 0.0, _Clock()

    def __call__(self, event: dict[str, Any]) -> None:
        left = ""
        if event["kind"] == "progress":
            left = self._clock.left(event)
            now = time.monotonic()
            if now - self._last_s < _QUIET_S:
                return
            self._last_s = now
        if (line := _line(event)) is not None:
            print(f"fusewise: {self.title}: {line}{left}", file=sys.stderr, flush=True)


class _Clock:
    """How long it will still take: by the pace so far, and no longer than the budget."""

    def __init__(self) -> None:
        self._began_s: float | None = None

    def left(self, event: dict[str, Any]) -> str:
        """``, about 35 s left``; empty as long as nobody can tell."""
        now = time.monotonic()
        if self._began_s is None:
            self._began_s = now
        limits = [event["left_s"]] if event.get("left_s") is not None else []
        if event["done"]:
            pace_s = (now - self._began_s) / event["done"]
            limits.append(pace_s * (event["planned"] - event["done"]))
        return f", about {_duration(min(limits))} left" if limits else ""


def _duration(time_s: float) -> str:
    return f"{time_s:.0f} s" if time_s < 90 else f"{time_s / 60:.0f} min"


def _line(event: dict[str, Any]) -> str | None:
    if event["kind"] == "progress":
        return f"{event['done']}/{event['planned']} {event['op']} {event['shape']}"
    if event["kind"] == "ready":
        return f"{event['path']} verified"
    if event["kind"] == "excluded":
        return f"{event['backend']} left out: {event['reason']}"
    return None
