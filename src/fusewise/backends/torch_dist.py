"""torch.distributed's own all-reduce: NCCL on GPUs, gloo on CPUs and shared GPUs. The baselines."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar

import torch.distributed as dist

from fusewise.backends.base import Backend
from fusewise.errors import RankTimeoutError, UnavailableError
from fusewise.profiles.schema import Numerics

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape


class _TorchDist(Backend):
    provider = "torch"
    # Both libraries reduce in the tensor's own type, hop by hop, in their algorithm's order.
    numerics = Numerics(accumulation="input", order="algorithm", rounds_sum=True)
    needs: ClassVar[str]

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        backend = str(dist.get_backend(group.process_group))
        if self.needs not in backend:
            raise UnavailableError(
                f"{self.id} cannot run on {group}",
                expected=f"a process group with the {self.needs} backend",
                got=backend,
                hint=f"Start it with init_process_group(backend={self.needs!r}).",
            )

    def admits(self, shape: Shape) -> str | None:
        return None

    def all_reduce(self, x: Tensor) -> Tensor:
        out = x.clone()
        self._sum(out)
        return out

    def _sum(self, out: Tensor) -> None:
        dist.all_reduce(out, group=self.group.process_group)


class Nccl(_TorchDist):
    """NCCL through torch.distributed, out of place as an engine calls it."""

    id = "nccl"
    needs = "nccl"

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        if node.device_type != "cuda":
            return "needs NVIDIA GPUs"
        if node.kind == "shared":
            return "NCCL takes one rank per GPU, and several share this one"
        return None if dist.is_nccl_available() else "this torch was built without NCCL"


class Gloo(_TorchDist):
    """gloo through torch.distributed, for CPU ranks and for ranks that share a GPU."""

    id = "gloo"
    needs = "gloo"
    capturable = False  # a GPU's tensors are copied out and summed by a thread of the host

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        if node.kind == "cuda":
            return "reduces in the CPU's memory; GPUs use nccl"
        return None if dist.is_gloo_available() else "this torch was built without gloo"

    def _sum(self, out: Tensor) -> None:
        work = dist.all_reduce(out, group=self.group.process_group, async_op=True)
        try:
            work.wait(timedelta(seconds=self.group.timeout_s))
        except RuntimeError as error:  # gloo's word for a time-out and for a lost peer
            raise RankTimeoutError(
                f"gloo all_reduce of {self.group}",
                expected=f"all ranks within {self.group.timeout_s:g} s",
                got=str(error).splitlines()[0],
                hint="Every rank must make the same calls in the same order.",
            ) from error
