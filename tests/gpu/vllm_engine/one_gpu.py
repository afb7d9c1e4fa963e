"""A vLLM plugin of the tests: two tensor-parallel ranks share one GPU, with a stand-in for NCCL.

Loaded by vLLM in each of its processes. NCCL takes one rank per GPU, so the process group is gloo's
and the plain all-reduce torch's one-shot kernel over symmetric memory, which can be captured. Dummy
weights are scaled so that logits differ, and differ between ranks, so that a sum over the wrong
ranks shows. Nothing of fusewise is changed; its native calls are counted, and where a test asks for
it one rank cannot take up full mode.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SCALE = 45.0  # vLLM's dummies are uniform in ±1e-3
LARGEST_BYTES = 2048 * 2048 * 2


def register() -> None:
    from vllm.platforms import current_platform

    kind: Any = type(current_platform)
    if getattr(kind, "_one_gpu", False):
        return
    kind._one_gpu = True
    torch.accelerator.device_count = lambda: 8
    kind.device_count = classmethod(lambda cls: 8)
    kind.dist_backend = "gloo"
    _all_workers_on_the_first_gpu()
    _stand_in_for_nccl()
    _scaled_weights()
    _count_native_calls()
    _break_full_mode_on_one_rank()


def _all_workers_on_the_first_gpu() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    init = WorkerBase.__init__

    @functools.wraps(init)
    def first(self: Any, vllm_config: Any, local_rank: int, *rest: Any, **more: Any) -> None:
        init(self, vllm_config, 0, *rest, **more)

    WorkerBase.__init__ = first


def _stand_in_for_nccl() -> None:
    from torch.distributed import _symmetric_memory
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

    init, plain = CudaCommunicator.__init__, CudaCommunicator.all_reduce

    @functools.wraps(init)
    def with_buffer(self: Any, *rest: Any, **more: Any) -> None:
        init(self, *rest, **more)
        self._one_gpu = None
        if self.unique_name.startswith("tp") and self.world_size > 1:
            buffer = _symmetric_memory.empty(LARGEST_BYTES, dtype=torch.uint8, device="cuda:0")
            self._one_gpu = buffer, _symmetric_memory.rendezvous(buffer, self.device_group)

    @functools.wraps(plain)
    def all_reduce(self: Any, input_: Any) -> Any:
        size = input_.numel() * input_.element_size()
        if self._one_gpu is None or input_.dtype != torch.bfloat16 or size % 16:
            return plain(self, input_)
        view = self._one_gpu[0][:size].view(input_.dtype).view(input_.shape).copy_(input_)
        return torch.ops.symm_mem.one_shot_all_reduce(view, "sum", self.device_group.group_name)

    CudaCommunicator.__init__, CudaCommunicator.all_reduce = with_buffer, all_reduce


def _scaled_weights() -> None:
    from vllm.model_executor.model_loader import weight_utils

    original = weight_utils.initialize_single_dummy_weight

    @functools.wraps(original)
    def scaled(param: Any, low: float = -1e-3, high: float = 1e-3, seed: int = 1234) -> None:
        shared = param.dim() < 2  # the norms' weights; everything else is split over the ranks
        original(param, low, high, seed if shared else seed + dist.get_rank())
        if torch.is_floating_point(param):
            with torch.no_grad():
                param.copy_(1 + 500 * param if shared else SCALE * param)

    weight_utils.initialize_single_dummy_weight = scaled


def _count_native_calls() -> None:
    from fusewise.backends.native.backend import NativeBackend

    counts = {"all_reduce_rms_norm_into": 0, "all_reduce": 0}

    def counted(name: str) -> None:
        original = getattr(NativeBackend, name)

        @functools.wraps(original)
        def call(self: Any, *rest: Any, **more: Any) -> Any:
            counts[name] += 1
            file = Path(os.environ["ONE_GPU_COUNTS"]) / f"{os.getpid()}.json"
            file.write_text(json.dumps(counts))
            return original(self, *rest, **more)

        setattr(NativeBackend, name, call)

    for name in counts:
        counted(name)


def _break_full_mode_on_one_rank() -> None:
    """On the rank that ``ONE_GPU_BREAKS`` names, if it names one."""
    if "ONE_GPU_BREAKS" not in os.environ:
        return
    from fusewise.engines.vllm import takeover

    side = takeover._side

    def broken(*arguments: Any) -> Any:
        if dist.get_rank() == int(os.environ["ONE_GPU_BREAKS"]):
            raise RuntimeError("broken on purpose")
        return side(*arguments)

    takeover._side = broken
