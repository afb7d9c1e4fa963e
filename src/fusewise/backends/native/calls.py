"""What a call of our kernels does on the host: look at one word, write a few addresses, enqueue.

Never synchronises, checks no shape and makes nothing but its results: what a shape fixes was
prepared by ``backend.py``. A call on another stream than the last one waits for the last one's
stream, so calls come on one stream at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.backends.native.cuda.launch import PreparedLaunch
    from fusewise.backends.native.fp8 import Fp8Result
    from fusewise.backends.native.watchdog import Pulse
    from fusewise.ranks.group import Group

_DEFAULT_STREAM = 0  # never captured, so never asked about
_MISALIGNED = 15  # the low bits of an address that a 16-byte access forbids


class Lane:
    """What all calls of one backend share: its pulse and the last stream.

    Args:
        group: the ranks.
        pulse: says whether a kernel waited in vain.
    """

    __slots__ = ("_device", "index", "last_stream", "pulse", "status")

    def __init__(self, group: Group, pulse: Pulse) -> None:
        self.pulse, self.status = pulse, pulse.status
        self._device, self.index = group.device, group.device.index
        self.last_stream = 0

    def follow(self, stream: int, captured: bool) -> None:
        """Makes a new stream wait for the last one, whose kernels share our counters."""
        if not captured:
            before: Any = _stream_at(self.last_stream, self._device)
            torch.cuda.current_stream(self._device).wait_stream(before)
        self.last_stream = stream


class Call:
    """The launch of one shape and kind of output, filled and enqueued at each call.

    Takes contiguous tensors on the backend's device with as many rows as it was prepared for, in
    any number of dimensions; copies those that a 16-byte access would miss.
    """

    __slots__ = (
        "_bounds_ns", "_captured", "_lane", "_launch", "_new", "_output", "_parameters", "_shape",
    )  # fmt: skip

    def __init__(self, launch: PreparedLaunch, lane: Lane) -> None:
        self._launch, self._lane = launch, lane
        self._parameters: Any = launch.parameters
        self._output = launch.output
        eager_ns = self._parameters.group.timeout_ns
        self._bounds_ns = eager_ns, min(eager_ns, int(1e9 * lane.pulse.replay_timeout_s))
        self._captured = False  # whether the parameters hold the second of them
        self._shape: torch.Size | None = None  # of the last x; _new makes a tensor like it
        self._new: Callable[[], Tensor]

    def sum(self, x: Tensor) -> Tensor:
        """The sum alone, as a new tensor."""
        if torch._C._cuda_getDevice() != self._lane.index:
            return self._there(self.sum, x)  # type: ignore[no-any-return]
        if x.shape != self._shape:
            self._shape, self._new = x.shape, _maker(x)
        out = self._new()
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
        if torch._C._cuda_getDevice() != self._lane.index:
            there: tuple[Tensor, Tensor] = self._there(
                self.norm, x, residual, weight, eps, weight_bias
            )
            return there
        if x.shape != self._shape:
            self._shape, self._new = x.shape, _maker(x)
        new = self._new
        norm, total = new(), new()
        self._write(norm, total, x, residual, weight, eps, weight_bias)
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
        given = norm, total, x, residual, weight, eps, weight_bias
        if torch._C._cuda_getDevice() != self._lane.index:
            self._there(self._write, *given)
        else:
            self._write(*given)

    def _write(
        self,
        norm: Tensor | None,
        total: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float,
    ) -> None:
        x_at, weight_at = x.data_ptr(), weight.data_ptr()
        residual_at = 0 if residual is None else residual.data_ptr()
        if (x_at | weight_at | residual_at) & _MISALIGNED:
            copies = x.clone(), None if residual is None else residual.clone(), weight.clone()
            return self._write(norm, total, *copies, eps, weight_bias)
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

    def _there(self, call: Callable[..., Any], *given: Any) -> Any:
        """With the backend's device as the current one, which the driver launches on."""
        with torch.cuda.device(self._lane.index):
            return call(*given)

    def _enqueue(self) -> None:
        lane = self._lane
        if lane.status.state:
            lane.pulse.check()
        stream = torch._C._cuda_getCurrentRawStream(lane.index)
        captured = stream != _DEFAULT_STREAM and torch._C._cuda_isCurrentStreamCapturing()
        if stream != lane.last_stream:
            lane.follow(stream, captured)
        if captured is not self._captured:
            self._parameters.group.timeout_ns = self._bounds_ns[captured]
            self._captured = captured
        self._launch(stream)


def _maker(x: Tensor) -> Callable[[], Tensor]:
    """Makes tensors like a contiguous one, on the current device: by what Inductor's code calls,
    without the dispatcher, in half of ``empty_like``'s time (read in torch 2.11.0 and 2.13.0)."""
    like = tuple(x.shape), x.stride(), x.dtype
    try:
        from torch._C._dynamo import guards

        return partial(getattr(guards, f"_empty_strided_{x.device.type}"), *like)
    except (ImportError, AttributeError):
        return partial(torch.empty_strided, *like[:2], dtype=like[2], device=x.device)


def _stream_at(address: int, device: torch.device) -> Any:
    make: Any = torch.cuda.ExternalStream
    return make(address, device)
