"""A driver that records what the native backends launch, and backends built on it. No GPU."""

from __future__ import annotations

import copy
import ctypes
import types
from typing import Any

import pytest
import torch

from fusewise.backends.native.cuda import launch
from fusewise.backends.native.cuda.launch import Kernels
from fusewise.backends.native.cuda.params import OneShotParams, TwoShotParams
from fusewise.backends.native.strategies import OneShot
from fusewise.shape import Shape
from tests.groups import MirrorGroup
from tests.unit.test_workspace import Host

pytest.importorskip("cuda.core", reason='needs pip install "fusewise[cuda]"')


class Driver:
    """Records launches; answers as a device of 132 multiprocessors with four blocks, or one cluster
    of any size, on each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sm: int = 90) -> None:
        from cuda.bindings import driver

        self.launches: list[Any] = []
        self.grids: list[int] = []
        self.answer = driver.CUresult.CUDA_SUCCESS
        self.loads: list[Any] = []
        facts = types.SimpleNamespace(major=sm // 10, minor=sm % 10, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        self.capturing, self.stream, self.device = False, 0, None
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.device, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False
        )
        monkeypatch.setattr(
            torch._C, "_cuda_isCurrentStreamCapturing", lambda: self.capturing, raising=False
        )
        monkeypatch.setattr(Kernels, "load", self.load)
        monkeypatch.setattr(
            driver, "cuOccupancyMaxActiveBlocksPerMultiprocessor", lambda *a: (self.answer, 4)
        )
        monkeypatch.setattr(driver, "cuOccupancyMaxActiveClusters", lambda *a: (self.answer, 132))
        monkeypatch.setattr(launch, "driver_launch", lambda: self.launch)

    def load(self, instance: Any) -> Any:
        self.loads.append(instance)
        return types.SimpleNamespace(handle=1)

    def launch(self, config: int, function: int, arguments: int, extra: None) -> int:
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        kind = OneShotParams if isinstance(self.backend, OneShot) else TwoShotParams
        self.launches.append(copy.copy(kind.from_address(address)))
        self.grids.append(ctypes.c_uint32.from_address(config).value)  # gridDimX comes first
        return int(self.answer)

    backend: Any


def built(
    monkeypatch: pytest.MonkeyPatch, kind: Any = OneShot, world_size: int = 2, sm: int = 90
) -> tuple[Any, Driver]:
    Host(monkeypatch, world_size)
    driver = Driver(monkeypatch, sm)
    driver.backend = kind(MirrorGroup(world_size), Shape(1024, 2048))
    return driver.backend, driver


def rows(num_tokens: int = 3, hidden_size: int = 2048, dtype: Any = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(num_tokens, hidden_size, dtype=dtype)
