"""The probe on machines that are not here: NVML and the environment are played."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from fusewise import node

MIG = 7  # the handle of a partition of GPU 0


class FakeNvml(types.ModuleType):
    """Two Hopper GPUs, as NVML describes them; old bindings answered in bytes."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, links: int = 18, count: int = 2) -> None:
        super().__init__("pynvml")
        self.links, self.count, self.open = links, count, 0
        self.lost: set[int] = set()
        self.silent: set[int] = set()
        self.old = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index not in range(self.count) or index in self.lost:
            raise self.NVMLError("no such index, or lost")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802
        uuid = "MIG-0000" if handle == MIG else f"GPU-{handle}{handle}aa-0000"
        return uuid.encode() if self.old else uuid

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> int:  # noqa: N802
        whole = [one for one in range(self.count) if one not in self.lost]
        handles = {f"GPU-{one}{one}aa-0000": one for one in whole} | {"MIG-0000": MIG}
        if uuid.decode() not in handles:
            raise self.NVMLError("not found")
        return handles[uuid.decode()]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: int) -> int:  # noqa: N802
        if handle != MIG:
            raise self.NVMLError("not a partition")
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:  # noqa: N802
        if handle in self.silent:
            raise self.NVMLError("no permission")
        return types.SimpleNamespace(free=100 + handle)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        if handle == MIG:
            raise self.NVMLError("not of a partition")
        return 9, 0

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"NVIDIA H200"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.159"

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:  # noqa: N802
        if link >= self.links:
            raise self.NVMLError("no such link")
        return 1


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_a_gpu_node_is_described_from_nvml_without_torch(nvml: FakeNvml) -> None:
    mark = node.probe(2)
    assert (mark.device, mark.sm, mark.fabric, mark.driver) == (
        "NVIDIA H200",
        90,
        "nv18",
        "580.159",
    )
    assert (mark.device_type, mark.world_size, mark.nodes) == ("cuda", 2, 1)
    assert nvml.open == 0, "what was opened is closed"


def test_links_decide_the_fabric_and_several_hosts_are_a_network(nvml: FakeNvml) -> None:
    nvml.links = 0
    assert node.probe(2).fabric == "pcie"
    assert node.probe(4, nodes=2).fabric == "net"


def test_cpu_ranks_can_be_asked_for_on_a_gpu_node(nvml: FakeNvml) -> None:
    mark = node.probe(2, device_type="cpu")
    assert (mark.device_type, mark.fabric, mark.sm) == ("cpu", "shm", None)
    assert node.probe(2, nodes=2, device_type="cpu").fabric == "net"


def test_no_nvml_or_no_gpu_means_cpu(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.count = 0
    assert node.probe(2).device_type == "cpu"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert node.probe(2).device_type == "cpu"
    assert node.gpu_count() == 0


@pytest.mark.parametrize(
    ("visible", "lost", "count", "free"),
    [
        (None, (), 2, 100),
        ("0", (), 1, 100),
        ("1", (), 1, 101),
        (" 1 , 0", (), 2, 101),
        ("0,1,2", (), 2, 100),
        ("1,2,0", (), 1, 101),
        ("GPU-11aa-0000,GPU-00", (), 2, 101),
        ("GPU-", (), 0, None),
        ("GPU-1,,GPU-0", (), 1, 101),
        ("MIG-0000", (), 1, 107),
        ("MIG-0000,GPU-0", (), 2, 107),
        ("0,0", (), 0, None),
        ("GPU-0,GPU-00aa-0000", (), 0, None),
        ("0,GPU-1", (), 1, 100),
        ("GPU-1,0", (), 1, 101),
        ("MIG-0001", (), 0, None),
        ("-1,0", (), 0, None),
        ("", (), 0, None),
        (None, (0,), 1, 101),
        ("0", (0,), 0, None),
        ("1", (0,), 1, 101),
        ("GPU-11aa-0000", (0,), 1, 101),
        ("GPU-1", (0,), 1, 101),
    ],
)
def test_visible_devices_are_counted_and_the_first_of_them_is_asked(
    visible: str | None,
    lost: tuple[int, ...],
    count: int,
    free: int | None,
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml.lost = set(lost)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (node.gpu_count(), node.gpu_free_bytes()) == (count, free)
    assert (node.gpu_facts() is None) == (count == 0)
    assert nvml.open == 0, "what was opened is closed"


def test_old_bindings_and_gpus_that_do_not_tell(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.old, nvml.silent = True, {1}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert (node.gpu_count(), node.gpu_free_bytes()) == (1, None)
    assert node.probe(2).device == "NVIDIA H200"


class FakeDriver:
    """libcuda as far as the multicast question goes."""

    def __init__(self, supported: int) -> None:
        self.supported = supported

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        assert attribute == 132, "CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED"
        value._obj.value = self.supported
        return 0


@pytest.mark.parametrize(
    ("supported", "switch", "answer"),
    [
        (1, {}, True),
        (0, {}, False),
        (1, {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}, False),
        (1, {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "0"}, True),
        (1, {"NCCL_NVLS_ENABLE": "0"}, False),
        (1, {"NCCL_NVLS_ENABLE": "1"}, True),
    ],
)
def test_multicast_needs_the_device_and_no_switch_against_it(
    supported: int,
    switch: dict[str, str],
    answer: bool,
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node.ctypes, "CDLL", lambda name: FakeDriver(supported))
    for name, value in switch.items():
        monkeypatch.setenv(name, value)
    assert node.multicast_supported() is answer


def test_without_a_driver_there_is_no_multicast(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(node.ctypes, "CDLL", missing)
    assert not node.multicast_supported()
