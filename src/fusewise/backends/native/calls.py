"""What a call of our kernels does on the host: look at one word, write a few addresses, enqueue.

Never synchronises, checks no shape and makes nothing but its results: what a shape fixes was
prepared by ``backend.py``. A call on another stream than the last one waits for the last one's
stream, so calls come on one stream at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fusewise.backends.native.cuda.params import Status
from fusewise.errors import RankTimeoutError

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.native.cuda.launch import PreparedLaunch
    from fusewise.backends.native.fp8 import Fp8Result
    from fusewise.ranks.group import Group

_MISALIGNED = 15  # the low bits of an address that a 16-byte access forbids
_PHASES = ("the peers' rows", "the peers' rows", "the reduced columns", "the partial sums")


class Lane:
    """What all calls of one backend share: the word that says it is dead, and the last stream.

    Args:
        label: the backend's id, for messages.
        group: the ranks.
        status: the words of a ``Status`` in host memory that the device writes.
    """

    __slots__ = ("_group", "_label", "_page", "index", "last_stream", "status")

    def __init__(self, label: str, group: Group, status: Tensor) -> None:
        self._label, self._group = label, group
        self._page = status  # keeps the memory
        self.status = Status.from_address(status.data_ptr())
        self.index = group.device.index
        self.last_stream = 0

    def check(self) -> None:
        """Raises if a kernel of this rank waited in vain; reads one host word, waits for nothing.

        Raises:
            RankTimeoutError: names the rank that waited, the row, the phase and the missing peer.
        """
        if self.status.state:
            raise _timed_out(self._label, self._group, self.status)

    def follow(self, stream: int) -> None:
        """Makes a new stream wait for the last one, whose kernels share our counters."""
        if not torch.cuda.is_current_stream_capturing():
            before: Any = _stream_at(self.last_stream, self._group.device)
            torch.cuda.current_stream(self._group.device).wait_stream(before)
        self.last_stream = stream


class Call:
    """The launch of one shape and kind of output, filled and enqueued at each call.

    Takes contiguous tensors on the backend's device with as many rows as it was prepared for, in
    any number of dimensions; copies those that a 16-byte access would miss.
    """

    __slots__ = ("_lane", "_launch", "_output", "_parameters")

    def __init__(self, launch: PreparedLaunch, lane: Lane) -> None:
        self._launch, self._lane = launch, lane
        self._parameters: Any = launch.parameters
        self._output = launch.output

    def sum(self, x: Tensor) -> Tensor:
        """The sum alone, as a new tensor."""
        out = torch.empty_like(x)
        x_at = x.data_ptr()
        if x_at & _MISALIGNED:
            return self.sum(x.clone())
        self._parameters.x, self._output.out = x_at, out.data_ptr()
        self._enqueue()
        return out

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float
    ) -> tuple[Tensor, Tensor]:
        """``(norm, sum + residual)`` as new tensors."""
        norm, total = torch.empty_like(x), torch.empty_like(x)
        self.norm_into(norm, total, x, residual, weight, eps, weight_bias)
        return norm, total

    def norm_into(
        self,
        norm: Tensor | None,
        total: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float,
    ) -> None:
        """Writes both results, to aligned tensors; no norm where ``norm`` is None."""
        x_at, weight_at = x.data_ptr(), weight.data_ptr()
        residual_at = 0 if residual is None else residual.data_ptr()
        if (x_at | weight_at | residual_at) & _MISALIGNED:
            copies = x.clone(), None if residual is None else residual.clone(), weight.clone()
            return self.norm_into(norm, total, *copies, eps, weight_bias)
        parameters = self._parameters
        parameters.x, parameters.residual, parameters.weight = x_at, residual_at, weight_at
        parameters.residual_out = total.data_ptr()
        parameters.eps, parameters.weight_bias = eps, weight_bias
        self._output.out = 0 if norm is None else norm.data_ptr()
        self._enqueue()
        return None

    def fp8_into(
        self,
        result: Fp8Result,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float,
    ) -> None:
        """Writes everything that ``result`` holds; its scale is read where it is a given one."""
        self._output.quantised = result.quantised.data_ptr()
        self._output.scales = self._output.static_scale = result.scales.data_ptr()
        self.norm_into(result.norm, result.residual_out, x, residual, weight, eps, weight_bias)

    def _enqueue(self) -> None:
        lane = self._lane
        if lane.status.state:
            lane.check()
        stream = torch._C._cuda_getCurrentRawStream(lane.index)
        if stream != lane.last_stream:
            lane.follow(stream)
        self._launch(stream)


def _timed_out(backend_id: str, group: Group, status: Status) -> RankTimeoutError:
    return RankTimeoutError(
        f"{backend_id} of {group} is dead",
        expected=f"{_PHASES[status.phase]} within {group.timeout_s:g} s",
        got=f"rank {group.ranks[status.rank]} waited at row {status.row} "
        f"for rank {group.ranks[status.peer]} (phase {status.phase})",
        hint="Results since then are NaN. Every rank must make the same calls in the same order; "
        "see the missing rank's own output, then build a new communicator.",
    )


def _stream_at(address: int, device: torch.device) -> Any:
    make: Any = torch.cuda.ExternalStream
    return make(address, device)
