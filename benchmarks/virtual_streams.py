"""One stream per virtual rank, each confined to its own share of the GPU's multiprocessors.

On a real node a rank has a GPU to itself: its GEMM and its blocks never wait for those of a peer.
On one GPU they would, wherever two ranks' kernels do not fit side by side; a green context a rank
(a share of the multiprocessors; cuda.h) keeps them apart. L2 and memory are shared.
"""

from __future__ import annotations

from typing import Any

import torch


def streams_of(world_size: int, partition: bool) -> list[Any]:
    """A stream per rank; ``partition`` gives each its own multiprocessors."""
    if not partition:
        return [torch.cuda.Stream() for _ in range(world_size)]
    from cuda.bindings import driver

    def done(answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"green contexts: {status}")
        return values[0] if len(values) == 1 else values

    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes the primary context, which the green ones belong to
    device = done(driver.cuDeviceGet(0))
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    all_sms = done(driver.cuDeviceGetDevResource(device, kind))
    share = all_sms.sm.smCount // world_size // 8 * 8  # sm_90 parts them in eights
    parts = done(driver.cuDevSmResourceSplitByCount(world_size, all_sms, 0, share))[0]
    streams = []
    for part in parts[:world_size]:
        description = done(driver.cuDevResourceGenerateDesc([part], 1))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = done(driver.cuGreenCtxCreate(description, device, flags))
        non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = done(driver.cuGreenCtxStreamCreate(context, non_blocking, 0))
        streams.append(torch.cuda.ExternalStream(int(stream)))
    return streams
