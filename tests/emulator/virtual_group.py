"""N ranks in one process: their buffers, their streams, and what a call must have computed."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusewise.backends.native.cuda.params import (
    DEAD_WORDS,
    GroupParams,
    OneShotParams,
    OutputParams,
    TwoShotParams,
)
from fusewise.backends.native.cuda.prepare import group_params
from fusewise.backends.native.instance import (
    MAX_BLOCKS,
    UNIT_BYTES,
    VECTOR_BYTES,
    WARP,
    Instance,
    sources_of,
    units_per_row,
)

from .build import COPY, CopyParams

POISON = -24576.0  # exact in every element type, and nothing that a test computes
GUARD = 64  # poisoned elements behind every output
FAULTS = ("none", "stuck", "steps used up", "threads diverged", "bad access")


@dataclass
class Call:
    """One collective call: the inputs of all ranks, and the outputs, filled by `run`."""

    instance: Instance
    x: list[Tensor]
    residual: list[Tensor] | None
    weight: Tensor
    weight_bias: float = 0.0
    eps: float = 1e-6
    workers: int = 3  # rows or tiles at a time
    rows_per_tile: int = 1  # two_shot
    threads: int = 32
    dependent: bool = True
    normal_output: bool = True
    static_scale: float = 0.25
    out: list[Tensor] = field(default_factory=list)
    residual_out: list[Tensor] = field(default_factory=list)
    quantised: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        return self.instance.output != "kSum"

    @property
    def units_per_row(self) -> int:
        """What a row fills of the slots: its whole width, or one rank's columns."""
        vectors = self.x[0].shape[1] * self.x[0].element_size() // VECTOR_BYTES
        shared = 1 if self.instance.kernel == "one_shot" else len(self.x)
        return units_per_row(-(-vectors // shared))

    def sum(self) -> Tensor:
        """The fp32 sum in rank order, with the residual, before it is rounded."""
        total = self.x[0].float()
        for x in self.x[1:]:
            total = total + x.float()
        return (
            total if self.residual is None or not self.fused else total + self.residual[0].float()
        )

    def norm(self) -> Tensor:
        """The norm in float64."""
        total = self.sum().double()
        scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps)
        return total * scale * (self.weight.double() + self.weight_bias)


class VirtualGroup:
    """Ranks with workspaces for ``unit_capacity`` units.

    Args:
        library: from `build`.
        instances: what it was built from, in order.
        timeout: in steps of the scheduler.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        instances: list[Instance],
        world_size: int,
        unit_capacity: int,
        timeout: int = 1 << 60,
        resident_blocks: int = 64,
    ) -> None:
        self.library, self.instances, self.world_size = library, instances, world_size
        self.unit_capacity, self.timeout = unit_capacity, timeout
        # Both strategies in one region, the widest of the two: more sharing than the backends do.
        vectors = 3 * sources_of(world_size) * UNIT_BYTES // 4
        words = unit_capacity * (vectors + world_size * MAX_BLOCKS)
        ranks = range(world_size)
        self.slots = [torch.full((words,), -1, dtype=torch.int32) for _ in ranks]
        self.epochs = [torch.zeros(unit_capacity, dtype=torch.int32) for _ in ranks]
        self.dead = [torch.zeros(DEAD_WORDS, dtype=torch.int32) for _ in ranks]
        self.status = [torch.zeros(5, dtype=torch.int32) for _ in ranks]
        self._alive: list[Tensor] = []
        library.emulator_open(world_size, resident_blocks)
        for rank, slots in enumerate(self.slots):
            library.emulator_slots(rank, _at(slots), ctypes.c_longlong(4 * words))

    def close(self) -> None:
        self.library.emulator_close()

    def calm(self, factor: int) -> None:
        """Makes all sleeps that many times shorter, so that ranks keep nearly in step."""
        self.library.emulator_calm(factor)

    def kill(self, rank: int, after: int) -> None:
        """The rank makes no step any more, and none of its stores lands, ``after`` so many."""
        self.library.emulator_kill(rank, ctypes.c_long(after))

    def pause(self, rank: int, after: int, steps: int) -> None:
        """The rank makes no step, and none of its stores lands, for ``steps`` steps."""
        self.library.emulator_pause(rank, ctypes.c_long(after), ctypes.c_long(steps))

    def run(self, calls: list[Call], seed: int, steps: int = 60_000_000) -> str:
        """Puts the calls into every rank's stream and lets them run; returns the fault."""
        for rank in range(self.world_size):
            self._enqueue(rank, calls)
        fault: int = self.library.emulator_run(ctypes.c_ulonglong(seed), ctypes.c_long(steps))
        self._alive.clear()
        return FAULTS[fault]

    def _enqueue(self, rank: int, calls: list[Call]) -> None:
        # All calls use the same buffers, as a framework's allocator would have it.
        size = max(_poisoned(call.x[0]).nbytes for call in calls)
        x, out, residual_out = (torch.zeros(size, dtype=torch.uint8) for _ in range(3))
        for call in calls:
            shape = call.x[rank].shape
            groups = math.ceil(shape[1] / 128) if call.instance.output == "kGroupFp8" else 1
            call.out.append(_poisoned(call.x[rank]))
            call.residual_out.append(_poisoned(call.x[rank]))
            call.quantised.append(torch.full((shape.numel() + GUARD,), 0x55, dtype=torch.uint8))
            call.scales.append(torch.full((shape[0] * groups + GUARD,), POISON))
            self._copy(rank, call.x[rank], x, call)
            self._copy(rank, call.out[rank].clone(), out, call)
            self._copy(rank, call.residual_out[rank].clone(), residual_out, call)
            self._kernel(rank, call, x, out, residual_out)
            self._copy(rank, out, call.out[rank], call)
            self._copy(rank, residual_out, call.residual_out[rank], call)

    def _kernel(self, rank: int, call: Call, x: Tensor, out: Tensor, residual_out: Tensor) -> None:
        instance = call.instance
        num_tokens, hidden_size = call.x[rank].shape
        row_vectors = hidden_size * call.x[rank].element_size() // VECTOR_BYTES
        shared = {
            "group": self._group_params(rank),
            "output": OutputParams(
                out=out.data_ptr() if call.normal_output else 0,
                quantised=call.quantised[rank].data_ptr(),
                scales=call.scales[rank].data_ptr(),
                static_scale=self._kept(torch.tensor([call.static_scale])).data_ptr(),
            ),
            "x": x.data_ptr(),
            "residual": 0 if call.residual is None else call.residual[rank].data_ptr(),
            "weight": call.weight.data_ptr(),
            "residual_out": residual_out.data_ptr(),
            "num_tokens": num_tokens,
            "row_vectors": row_vectors,
            "inverse_hidden_size": 1.0 / hidden_size,
            "eps": call.eps,
            "weight_bias": call.weight_bias,
        }
        assert num_tokens * call.units_per_row <= self.unit_capacity
        params: ctypes.Structure
        if instance.kernel == "one_shot":
            assert call.threads * instance.vectors * instance.blocks >= row_vectors
            params = OneShotParams(row_units=call.units_per_row, **shared)
        else:
            params = TwoShotParams(
                shard_vectors=-(-row_vectors // self.world_size),
                shard_units=call.units_per_row,
                rows_per_tile=call.rows_per_tile,
                **shared,
            )
        entry = 1 + self.instances.index(instance)
        assert self.library.emulator_params_bytes(entry) == ctypes.sizeof(params)
        self.library.emulator_launch(
            rank, entry, call.workers * instance.blocks, call.threads, instance.cluster,
            call.dependent, ctypes.byref(params),
        )  # fmt: skip

    def _group_params(self, rank: int) -> GroupParams:
        return group_params(
            [slots.data_ptr() for slots in self.slots],
            rank,
            epochs=self.epochs[rank].data_ptr(),
            dead=self.dead[rank].data_ptr(),
            status=self.status[rank].data_ptr(),
            units=self.unit_capacity,
            timeout_s=self.timeout / 1e9,
        )

    def _copy(
        self, rank: int, source: Tensor, target: Tensor, call: Call, hasty: bool = False
    ) -> None:
        count = min(source.nbytes, target.nbytes) // 4
        pointers = self._kept(source).data_ptr(), self._kept(target).data_ptr()
        params = CopyParams(*pointers, count, hasty)
        self.library.emulator_launch(rank, COPY, 1, WARP, 1, call.dependent, ctypes.byref(params))

    def _kept(self, tensor: Tensor) -> Tensor:
        self._alive.append(tensor)
        return tensor


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _poisoned(like: Tensor) -> Tensor:
    return torch.full((like.numel() + GUARD,), POISON, dtype=like.dtype)
