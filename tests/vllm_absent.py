"""What of vLLM and beneath it is not there without a GPU: compiled parts, executors, servers."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
from typing import Any
from unittest import mock

_ABSENT = (
    "vllm._C", "vllm._C_stable_libtorch", "vllm.v1.executor", "vllm.distributed.kv_transfer",
    "aiohttp", "cachetools", "cbor2", "cloudpickle", "cpuinfo", "gguf", "mistral_common", "msgspec",
    "openai", "openai_harmony", "opentelemetry", "pybase64", "requests", "sentencepiece", "urllib3",
    "uvloop", "xxhash", "zmq",
)  # fmt: skip


# Operators of vLLM's compiled parts that the fusion passes name when they are imported.
OPERATORS = (
    "dynamic_per_token_scaled_fp8_quant", "dynamic_scaled_fp8_quant", "fused_add_rms_norm",
    "fused_add_rms_norm_static_fp8_quant", "per_token_group_fp8_quant",
    "rms_norm_dynamic_per_token_quant", "rms_norm_per_block_quant", "rms_norm_static_fp8_quant",
    "rotary_embedding", "silu_and_mul", "static_scaled_fp8_quant",
)  # fmt: skip


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for modules that are not here."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in _ABSENT):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass
