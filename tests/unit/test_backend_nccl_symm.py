"""NCCL over symmetric windows: registration, results and limits."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusewise.backends import nccl_symm
from fusewise.errors import UnavailableError
from fusewise.shape import Shape
from tests.groups import MirrorGroup
from tests.provider_fakes import check_reduces, rows

MAX = Shape(64, 2048, "bfloat16")  # 256 KiB


class FakeNccl:
    """ProcessGroupNCCL's two methods, with torch 2.13's parameters (ProcessGroupNCCL.hpp)."""

    mem_allocator = "allocator"

    def __init__(self) -> None:
        self.log: list[Any] = []

    def register_mem_pool(self, pool: Any, symm: bool = False) -> None:
        self.log.append(("register", pool, symm))

    def deregister_mem_pool(self, pool: Any) -> None:
        self.log.append(("deregister", pool))


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    backend = FakeNccl()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda allocator: f"pool of {allocator}")
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool, device: contextlib.nullcontext())
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    return backend


def _nccl_group(backend: FakeNccl) -> Any:
    group = MirrorGroup()
    group.process_group = types.SimpleNamespace(_get_backend=lambda device: backend)
    return group


def test_nccl_symm_reduces_in_a_registered_window(nccl: FakeNccl) -> None:
    backend = nccl_symm.NcclSymm(_nccl_group(nccl), MAX)
    assert nccl.log == [("register", "pool of allocator", True)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_reduces(backend, rows(3, dtype=dtype))
    assert backend.admits(Shape(64, 2048)) is None
    assert "workspace" in str(backend.admits(Shape(65, 2048)))
    assert backend.admits(Shape(0, 2048)) is not None
    backend.close()
    backend.close()
    assert nccl.log[1:] == [("deregister", "pool of allocator")]
    with pytest.raises(UnavailableError, match="closed"):
        backend.all_reduce(rows(1))


def test_nccl_symm_needs_an_nccl_group(nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    with pytest.raises(UnavailableError, match="process group with the nccl backend"):
        nccl_symm.NcclSymm(_nccl_group(nccl), MAX)
