"""Tests measure beside each other and whoever else uses this machine: a lock of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_measuring_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("lock") / "measuring.lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "FUSEWISE_MEASURING_LOCK", str(file))
        yield
