"""Which backend runs where: a matrix of nodes, packages and switches, without any of them here."""

from __future__ import annotations

import importlib.util
import shutil
import types
from typing import Any

import pytest
import torch.distributed as dist

from fusewise.backends import flashinfer_limits, nccl_symm
from fusewise.backends.registry import all_ids, backend_class, baseline_id, ids_for
from fusewise.node import Fingerprint

BACKENDS = {name: backend_class(name) for name in all_ids()}
GPU_IDS = ids_for("cuda")
PEERS_ONLY = [name for name in GPU_IDS if name != baseline_id("cuda")]
FLASHINFER = ("flashinfer.one_shot", "flashinfer.two_shot", "flashinfer.mnnvl", "custom")
SWITCHES = (
    "TORCH_SYMMMEM", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_WIN_ENABLE",
    "NCCL_CUMEM_ENABLE", "CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC",
)  # fmt: skip


def _node(**changes: Any) -> Fingerprint:
    facts: dict[str, Any] = {
        "device_type": "cuda", "device": "NVIDIA H200", "sm": 90, "world_size": 8,
        "fabric": "nv18", "multicast": True, "nccl": "2.28.9", "flashinfer": "0.6.11.post2",
    }  # fmt: skip
    return Fingerprint(**(facts | changes))


@pytest.fixture(autouse=True)
def _everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    _packages(monkeypatch, "flashinfer", "flashinfer_jit_cache", "cuda.core", "cuda.bindings")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    _nccl(monkeypatch, "register_mem_pool(self, pool: MemPool, symm: bool = False) -> None")


def _packages(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    spec = types.SimpleNamespace(origin="/nowhere/flashinfer/__init__.py")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name in installed else None
    )


def _nccl(monkeypatch: pytest.MonkeyPatch, doc: str | None) -> None:
    kind = types.SimpleNamespace(register_mem_pool=types.SimpleNamespace(__doc__=doc))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: doc is not None)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", kind, raising=False)


@pytest.mark.parametrize("name", GPU_IDS)
def test_all_are_available_on_eight_h200s(name: str) -> None:
    assert BACKENDS[name].available(_node()) is None


@pytest.mark.parametrize("name", PEERS_ONLY)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_type": "cpu", "fabric": "shm", "sm": None}, "needs NVIDIA GPUs"),
        ({"nodes": 2, "fabric": "net"}, "several hosts"),
        ({"world_size": 1}, "one rank"),
    ],
)
def test_none_is_without_gpus_peers_or_one_host(
    name: str, changes: dict[str, Any], words: str
) -> None:
    assert words in str(BACKENDS[name].available(_node(**changes)))


CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("nccl", {}, None),
    ("nccl", {"device_type": "cpu", "sm": None}, "GPU"),
    ("gloo", {"device_type": "cpu", "sm": None}, None),
    ("gloo", {}, "nccl"),
    ("shm.one_shot", {"device_type": "cpu", "sm": None}, None),
    ("shm.one_shot", {"device_type": "cpu", "sm": None, "nodes": 2}, "host"),
    ("native.one_shot", {"sm": 75}, "sm_80"),
    ("native.one_shot", {"world_size": 6}, "2, 4, 8 ranks"),
    ("native.two_shot", {"world_size": 2}, "4, 8 ranks"),
    ("native.two_shot", {"device_type": "cpu", "sm": None}, "GPUs"),
    ("symm_mem.one_shot", {"sm": 75}, "sm_80"),
    ("symm_mem.one_shot", {"sm": 80, "world_size": 3, "multicast": False}, None),
    ("symm_mem.two_shot", {"sm": 80, "fabric": "pcie"}, None),
    ("multimem", {"multicast": False}, "multicast is absent or switched off"),
    ("multimem", {"sm": 80}, "sm_90"),
    ("flashinfer.one_shot", {"sm": 80}, "sm_90"),
    ("flashinfer.one_shot", {"sm": 103}, None),
    ("flashinfer.one_shot", {"sm": 120}, "sm_90"),
    ("flashinfer.two_shot", {"world_size": 6}, "6"),
    ("flashinfer.two_shot", {"world_size": 16}, None),
    ("flashinfer.two_shot", {"flashinfer": "0.6.10"}, "too old"),
    ("flashinfer.two_shot", {"flashinfer": "0.7.0rc1"}, None),
    ("flashinfer.two_shot", {"flashinfer": None}, None),
    ("flashinfer.mnnvl", {"multicast": False}, "multicast is absent or switched off"),
    ("flashinfer.mnnvl", {"sm": 120}, "sm_90"),
    ("custom", {"world_size": 6}, None),
    ("custom", {"world_size": 16}, "16"),
    ("custom", {"sm": 75}, "sm_80"),
    ("custom", {"fabric": "pcie", "world_size": 4}, "joined by NVLink"),
    ("custom", {"fabric": "pcie", "world_size": 2}, None),
    ("nccl_symm", {"nccl": "2.26.5"}, "2.27"),
    ("nccl_symm", {"nccl": "2.27.3"}, None),
    ("nccl_symm", {"nccl": None}, None),
    ("nccl_symm", {"fabric": "pcie"}, "NVLink"),
]


@pytest.mark.parametrize(("name", "changes", "words"), CASES)
def test_node_decides(name: str, changes: dict[str, Any], words: str | None) -> None:
    reason = BACKENDS[name].available(_node(**changes))
    assert reason is None if words is None else words in str(reason)


ENVIRONMENTS = [
    ("symm_mem.one_shot", "TORCH_SYMMMEM", "NVSHMEM", "unset TORCH_SYMMMEM"),
    ("symm_mem.one_shot", "TORCH_SYMMMEM", "CUDA", None),
    ("custom", "PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True",
     "remove expandable_segments:True from PYTORCH_CUDA_ALLOC_CONF"),
    ("custom", "PYTORCH_ALLOC_CONF", "expandable_segments:true", "from PYTORCH_ALLOC_CONF"),
    ("custom", "PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync", "backend:cudaMallocAsync"),
    ("custom", "PYTORCH_CUDA_ALLOC_CONF", "backend:native", None),
    ("custom", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False", None),
    ("nccl_symm", "NCCL_CUMEM_ENABLE", "0", "NCCL_CUMEM_ENABLE=0"),
    ("nccl_symm", "NCCL_WIN_ENABLE", "0", "NCCL_WIN_ENABLE=0"),
    ("nccl_symm", "NCCL_WIN_ENABLE", "1", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "variable", "value", "words"), ENVIRONMENTS)
def test_environment_decides(
    monkeypatch: pytest.MonkeyPatch, name: str, variable: str, value: str, words: str | None
) -> None:
    monkeypatch.setenv(variable, value)
    reason = BACKENDS[name].available(_node())
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize("name", FLASHINFER)
def test_flashinfer_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _packages(monkeypatch)
    reason = BACKENDS[name].available(_node(flashinfer=None))
    assert reason == "flashinfer is not installed; pip install 'fusewise[flashinfer]'"


@pytest.mark.parametrize("name", FLASHINFER)
def test_flashinfer_without_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, name: str
) -> None:
    _packages(monkeypatch, "flashinfer")
    monkeypatch.setattr(flashinfer_limits, "_CUDA_HOME", str(tmp_path / "none"))
    assert "finds no nvcc" in str(BACKENDS[name].available(_node()))
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert BACKENDS[name].available(_node()) is None


@pytest.mark.parametrize(
    ("name", "module"), [("custom", "vllm_comm"), (FLASHINFER[0], "trtllm_comm")]
)
def test_flashinfer_prebuilt_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, name: str, module: str
) -> None:
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "flashinfer" else None
    )
    monkeypatch.setattr(flashinfer_limits, "_CUDA_HOME", str(tmp_path / "none"))
    assert "finds no nvcc" in str(BACKENDS[name].available(_node()))
    library = tmp_path / "data" / "aot" / module / f"{module}.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert BACKENDS[name].available(_node()) is None


@pytest.mark.parametrize(
    ("doc", "words"), [(None, "without NCCL"), ("register_mem_pool(self, pool)", "torch 2.11")]
)
def test_torch_without_symmetric_windows(
    monkeypatch: pytest.MonkeyPatch, doc: str | None, words: str
) -> None:
    _nccl(monkeypatch, doc)
    assert words in str(nccl_symm.NcclSymm.available(_node()))


def test_every_backend_is_asked_about() -> None:
    assert {name for name, *_ in CASES} == set(all_ids())
