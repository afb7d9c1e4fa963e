"""What this node is: GPU, links, multicast, versions. The probe never imports torch or CUDA.

Facts come from NVML, the driver and the installed packages' metadata, so ``explain`` and
``doctor`` answer in a fraction of a second. Nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

HARDWARE = ("device_type", "device", "sm", "world_size", "nodes", "fabric", "multicast")
SOFTWARE = ("driver", "cuda", "nccl", "torch", "flashinfer")

_KERNELS = Path(__file__).parent / "backends" / "native" / "cuda"
# CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED in cuda.h (CUDA 12.1 and later).
_ATTRIBUTE_MULTICAST_SUPPORTED = 132
_NVLINK_MAX = 18  # NVML_NVLINK_MAX_LINKS


Kind = Literal["cuda", "shared", "cpu"]  # a GPU per rank, several ranks on one, CPU ranks
SHARED = "shared"  # the fabric of ranks that reach each other inside one GPU


class Fingerprint(BaseModel):
    """The identity of a measured node. Two equal fingerprints may share a profile.

    ``fabric`` is ``nv18`` for 18 active NVLinks per GPU, ``pcie`` without NVLink, ``shm`` for CPU
    ranks of one host, ``net`` for ranks of several hosts, ``shared`` where several ranks have one
    GPU. Versions are ``None`` where absent.
    ``kernels`` is the digest of our own CUDA sources: what was measured of others is not ours now.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_type: Literal["cuda", "cpu"]
    device: str = Field(min_length=1, max_length=120)
    sm: int | None = Field(default=None, ge=10, le=9999)
    world_size: int = Field(ge=1, le=4096)
    nodes: int = Field(default=1, ge=1, le=4096)
    fabric: str = Field(min_length=1, max_length=40, pattern=r"^[a-z0-9-]+$")
    multicast: bool = False
    driver: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    torch: str | None = None
    flashinfer: str | None = None
    kernels: str | None = None

    @property
    def kind(self) -> Kind:
        """Where its ranks run, as ``ranks.place`` and the registry of backends name it."""
        return "shared" if self.fabric == SHARED else self.device_type

    def differences(self, other: Fingerprint, fields: tuple[str, ...]) -> list[str]:
        """One line per differing field: ``torch: 2.11.0 in the profile, 2.13.0 here``."""
        return [
            f"{name}: {mine} in the profile, {theirs} here"
            for name in fields
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]


def probe(
    world_size: int, *, nodes: int = 1, device_type: str | None = None, shared: bool = False
) -> Fingerprint:
    """The fingerprint of a group of ``world_size`` ranks on this host.

    ``device_type`` forces ``"cpu"``; by default GPUs are used where NVML shows one. ``shared``:
    several ranks have one GPU, so there is no fabric between them and no multicast.
    """
    software: dict[str, Any] = {
        "torch": _version("torch"),
        "flashinfer": _version("flashinfer-python"),
    }
    gpu = None if device_type == "cpu" else gpu_facts()
    if gpu is None:
        fabric = "shm" if nodes == 1 else "net"
        return Fingerprint(
            device_type="cpu",
            device=cpu_name(),
            world_size=world_size,
            nodes=nodes,
            fabric=fabric,
            **software,
        )
    if nodes > 1:
        gpu["fabric"] = "net"
    elif shared:
        gpu |= {"fabric": SHARED, "multicast": False}
    software |= {"cuda": _torch_cuda(), "nccl": _nccl(), "kernels": kernels_digest()}
    return Fingerprint(device_type="cuda", world_size=world_size, nodes=nodes, **gpu, **software)


def gpu_facts() -> dict[str, Any] | None:
    """Name, sm, fabric, multicast and driver of the first visible GPU; None without one."""
    with _visible_gpus() as (nvml, gpus):
        if not gpus:
            return None
        whole = _whole_gpu(nvml, gpus[0])
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(whole)
        links = _active_links(nvml, whole)
        return {
            "device": _text(nvml.nvmlDeviceGetName(gpus[0])),
            "sm": 10 * major + minor,
            "fabric": f"nv{links}" if links else "pcie",
            "multicast": multicast_supported(),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
        }


def gpu_count() -> int:
    """GPUs that NVML shows, narrowed by CUDA_VISIBLE_DEVICES."""
    with _visible_gpus() as (_, gpus):
        return len(gpus)


def gpu_free_bytes() -> int | None:
    """Free memory of the first visible GPU; None where NVML does not tell."""
    with _visible_gpus() as (nvml, gpus):
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(gpus[0]).free) if gpus else None
        except nvml.NVMLError:
            return None


@contextmanager
def _visible_gpus() -> Iterator[tuple[Any, list[Any]]]:
    """NVML, and its handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, no permission: the same answer, no GPU here
        yield None, []
        return
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield pynvml, _all_gpus(pynvml) if visible is None else _named(pynvml, visible)
    finally:
        pynvml.nvmlShutdown()


def _all_gpus(nvml: Any) -> list[Any]:
    """Without those that are lost or another's."""
    found = [
        _or_none(nvml, nvml.nvmlDeviceGetHandleByIndex, i) for i in range(nvml.nvmlDeviceGetCount())
    ]
    return [gpu for gpu in found if gpu is not None]


def _named(nvml: Any, visible: str) -> list[Any]:
    """Those that the list's items name: an index, or the UUID of a GPU or a MIG, or its beginning.

    As for CUDA the list ends at the first item that names none or is not of the first one's kind,
    and nothing is visible if one is named twice. NVML counts by PCI bus, as CUDA does where all
    GPUs are equally fast.
    """
    items = [word.strip() for word in visible.split(",")]
    found: list[Any] = []
    for item in items:
        if item.isdecimal() != items[0].isdecimal():
            break
        by_index = nvml.nvmlDeviceGetHandleByIndex
        gpu = _or_none(nvml, by_index, int(item)) if item.isdecimal() else _by_uuid(nvml, item)
        if gpu is None:
            break
        found.append(gpu)
    uuids = {_text(nvml.nvmlDeviceGetUUID(gpu)) for gpu in found}
    return found if len(uuids) == len(found) else []


def _by_uuid(nvml: Any, uuid: str) -> Any:
    """The GPU or MIG of that UUID, or the only GPU whose UUID begins so; None without one."""
    gpu = _or_none(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid.encode())
    if gpu is not None or not uuid.startswith("GPU-"):
        return gpu
    begun = [g for g in _all_gpus(nvml) if _text(nvml.nvmlDeviceGetUUID(g)).startswith(uuid)]
    return begun[0] if len(begun) == 1 else None


def _whole_gpu(nvml: Any, gpu: Any) -> Any:
    """Of a MIG the GPU that it is a part of, which has the links and the architecture."""
    whole = _or_none(nvml, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, gpu)
    return gpu if whole is None else whole


def _or_none(nvml: Any, get: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return get(argument)
    except nvml.NVMLError:
        return None


def multicast_supported() -> bool:
    """Whether NVLink multicast may be used: the device has it and no switch turns it off.

    ``TORCH_SYMM_MEM_DISABLE_MULTICAST`` is torch's own switch; ``NCCL_NVLS_ENABLE=0`` is honoured
    too, because whoever turned multicast off for NCCL meant the node. Only asks; never binds.
    """
    return os.environ.get("NCCL_NVLS_ENABLE", "") != "0" and torch_multicast()


def torch_multicast() -> bool:
    """Whether torch's symmetric memory uses multicast here: NCCL's switch says nothing to it."""
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0") not in ("", "0"):
        return False
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    value, device = ctypes.c_int(0), ctypes.c_int(0)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return False
    failed = cuda.cuDeviceGetAttribute(ctypes.byref(value), _ATTRIBUTE_MULTICAST_SUPPORTED, device)
    return not failed and value.value == 1


@functools.lru_cache(maxsize=1)
def kernels_digest() -> str:
    """A digest of our CUDA sources, over names and contents, comments included."""
    content = hashlib.sha256()
    for file in sorted(_KERNELS.glob("*.cu*")):
        content.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def cpu_name() -> str:
    """The processor's model name, as /proc/cpuinfo gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return (match[1].strip() if match else platform.machine() or "cpu")[:120]


def _active_links(pynvml: Any, handle: Any) -> int:
    active = 0
    for link in range(_NVLINK_MAX):
        try:
            active += int(pynvml.nvmlDeviceGetNvLinkState(handle, link) == 1)
        except pynvml.NVMLError:  # the link does not exist on this device
            break
    return active


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """``torch.version.cuda``, read from torch/version.py without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
    return match[1] if match else None


def _nccl() -> str | None:
    for distribution in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        version = _version(distribution)
        if version:
            return version
    return None
