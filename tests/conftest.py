"""What tests must not share with whoever uses this machine: its measuring lock, its profiles.

And what each process that runs tests does once for all of them.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.testing

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read with torch; tests' processes fill the cores
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what it runs in the background so, and children inherit it: those that a test
    # interrupts would not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # while tests are collected: modules are not garbage, and collecting is not free


def pytest_collection_finish() -> None:
    """What every test shares is never garbage: without it each full collection walks all of it."""
    gc.freeze()
    gc.set_threshold(
        50_000
    )  # simulations of engines run here, and make as many objects as a compiler
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _own_measuring_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("lock") / "measuring.lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "FUSEWISE_MEASURING_LOCK", str(file))
        # Inductor believes the processor's flags; for every empty cache it would compile and run a
        # program per instruction set, ten seconds of a core.
        patch.setitem(os.environ, "TORCHINDUCTOR_VEC_ISA_OK", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def _commands_made_once() -> Iterator[None]:
    """Typer's runner would make every command anew at each call, for 25 ms."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(typer.testing._get_command)
        patch.setattr(typer.testing, "_get_command", once)
        yield


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty shelf of profiles, and no variable that answers in their place."""
    monkeypatch.setenv("FUSEWISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUSEWISE_SITE_DIR", str(tmp_path / "site"))
    monkeypatch.delenv("FUSEWISE_PROFILE", raising=False)
    monkeypatch.delenv("FUSEWISE_CAP", raising=False)
    monkeypatch.setattr("sys.argv", ["fusewise"])
    return tmp_path / "home" / "profiles"
