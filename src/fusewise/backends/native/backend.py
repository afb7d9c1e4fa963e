"""What our own kernels share on the host: availability, workspace, one prepared launch per shape.

A call looks up its launch, writes a few addresses and enqueues it; it never synchronises. What the
kernels do and why it is right is in ``cuda/*.cuh`` and ``docs/kernels.md``.

All calls of one backend must come in one order on all ranks, as with every collective, and on one
stream at a time: a call on another stream than the last one first waits for the last one's stream.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fusewise.backends.base import DTYPE_NAMES, Backend
from fusewise.backends.native.cuda.build import missing_compiler
from fusewise.backends.native.cuda.launch import Kernels, PreparedLaunch
from fusewise.backends.native.cuda.params import Status
from fusewise.backends.native.cuda.prepare import group_params
from fusewise.backends.native.fp8 import Fp8, Fp8Result, check_static_scale
from fusewise.backends.native.workspace import SlotLayout, Workspace
from fusewise.backends.steps import not_on_one_host, together
from fusewise.errors import FusewiseError, InputError, RankTimeoutError, UnavailableError
from fusewise.profiles.schema import Numerics
from fusewise.shape import Shape

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

    from torch import Tensor

    from fusewise.backends.native.variants import LaunchShape, Output
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group

_MAX_PREPARED = 4096  # launches kept, one per number of tokens and kind of output; near 2 KB each
_MISALIGNED = 15  # the low bits of an address that a 16-byte access forbids
_PHASES = ("the peers' rows", "the peers' rows", "the reduced columns", "the partial sums")
_OUTPUTS: dict[str, Output] = {
    "static": "kStaticFp8", "token": "kTokenFp8", "group": "kGroupFp8",
}  # fmt: skip


class NativeBackend(Backend):
    """A backend over one of our kernels; subclasses name the kernel and size its slots."""

    provider = "native"
    fused = True
    numerics = Numerics(accumulation="float32", order="rank", rounds_sum=False)
    world_sizes: ClassVar[tuple[int, ...]]
    kernel: ClassVar[Callable[..., tuple[LaunchShape, ctypes.Structure]]]

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        if node.device_type != "cuda":
            return "needs NVIDIA GPUs; CPU ranks use shm or gloo"
        if (node.sm or 0) < 80:
            return f"needs sm_80 or newer, this is sm_{node.sm}; use nccl"
        if reason := not_on_one_host(node.nodes, node.world_size):
            return reason
        if node.world_size not in cls.world_sizes:
            sizes = ", ".join(map(str, cls.world_sizes))
            return f"is written for {sizes} ranks, the group has {node.world_size}"
        return missing_compiler()

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        self._kernels = together(group, f"{self.id}: device", self._open_device)
        self._workspace = Workspace(group, self._room(max_shape), self.id)
        self._status = Status.from_address(self._workspace.status.data_ptr())
        self._launches: dict[Any, PreparedLaunch] = {}
        self._selected: dict[tuple[bool, Shape], str] = {}  # variants, by (fused, shape)
        self._index = group.device.index
        self._last_stream = 0
        try:
            first = Shape(1, max_shape.hidden_size, max_shape.dtype)
            together(group, f"{self.id}: compile", lambda: self._prepare(first, "kNorm"))
        except FusewiseError:
            self.close()
            raise

    def _open_device(self) -> Kernels:
        facts = torch.cuda.get_device_properties(self.group.device)
        sm = 10 * facts.major + facts.minor
        return Kernels(sm, facts.multi_processor_count)

    def _room(self, shape: Shape) -> SlotLayout:
        return self._layout(self._limited(shape)).with_slack()

    def _limited(self, shape: Shape) -> Shape:
        """The largest shape that the workspace is made for."""
        return shape

    @abstractmethod
    def _layout(self, shape: Shape) -> SlotLayout:
        """The slots that a message of this shape takes."""

    def _prepare(self, shape: Shape, output: Output) -> PreparedLaunch:
        """A launch with everything filled in that the shape and the group fix."""
        workspace, group = self._workspace, self.group
        params = group_params(
            workspace.region.slots,
            group.rank,
            epochs=workspace.region.epochs.data_ptr(),
            dead=workspace.dead.data_ptr(),
            status=workspace.status.data_ptr(),
            units=workspace.region.layout.units,
            timeout_s=group.timeout_s,
        )
        variant = self._selected.get((output != "kSum", shape), "")
        kernel = self.kernel(shape, group.world_size, self._kernels.sm, output, params, variant)
        return self._kernels.prepare(*kernel)

    def admits(self, shape: Shape) -> str | None:
        if shape.hidden_size % 8:
            return f"hidden size {shape.hidden_size} is no multiple of 8"
        if shape.num_tokens < 1:
            return "an empty message"
        return self._workspace.region.layout.lacks(self._layout(shape))

    def reserve(self, max_shape: Shape) -> None:
        """Makes room for larger messages. Collective; not while a graph is captured.

        Raises:
            DisagreementError: ranks ask for different shapes.
            WorkspaceError: no memory on some rank; nothing has changed.
        """
        if self._workspace.reserve(self._room(max_shape)):
            self._launches.clear()
            self.max_shape = max(self.max_shape, max_shape, key=lambda s: s.message_bytes)

    def all_reduce(self, x: Tensor) -> Tensor:
        launch = self._launch_for(x, "kSum")
        out = torch.empty_like(x)
        launch.parameters.x = x_at = x.data_ptr()
        if x_at & _MISALIGNED:
            raise _misaligned()
        launch.output.out = out.data_ptr()
        self._enqueue(launch)
        return out

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        norm, total = torch.empty_like(x), torch.empty_like(x)
        self.all_reduce_rms_norm_into(norm, total, x, residual, weight, eps, weight_bias)
        return norm, total

    def all_reduce_rms_norm_into(
        self,
        norm: Tensor,
        total: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float = 0.0,
    ) -> None:
        """Into aligned tensors like ``x`` that may be ``x`` and ``residual`` themselves: the thread
        that writes an element is the one that read it (tests/emulator/test_in_place.py)."""
        launch = self._launch_for(x, "kNorm")
        launch.output.out = norm.data_ptr()
        self._fill(launch, x, residual, weight, total, eps, weight_bias)
        self._enqueue(launch)

    def all_reduce_rms_norm_fp8(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        fp8: Fp8,
        weight_bias: float = 0.0,
        static_scale: Tensor | None = None,
    ) -> Fp8Result:
        """As ``all_reduce_rms_norm``, with the norm quantised to FP8 e4m3 in the same kernel.

        The quantised values equal ``native.fp8.quantise`` of the norm as returned.

        Args:
            x, residual, weight, eps, weight_bias: as ``all_reduce_rms_norm``.
            fp8: how to scale, and whether the norm is wanted too.
            static_scale: one fp32 number on the device, with ``scaling="static"`` only.

        Raises:
            InputError: the scale does not fit ``fp8``.
            UnavailableError: the GPU is older than sm_89, which brought e4m3.
        """
        if self._kernels.sm < 89:
            raise UnavailableError(
                "FP8 outputs", expected="sm_89 or newer", got=f"sm_{self._kernels.sm}"
            )
        check_static_scale(fp8, static_scale, x.device)
        launch = self._launch_for(x, _OUTPUTS[fp8.scaling])
        result = fp8.empty_result(x, static_scale)
        launch.output.out = 0 if result.norm is None else result.norm.data_ptr()
        launch.output.quantised = result.quantised.data_ptr()
        launch.output.scales = launch.output.static_scale = result.scales.data_ptr()
        self._fill(launch, x, residual, weight, result.residual_out, eps, weight_bias)
        self._enqueue(launch)
        return result

    def check(self) -> None:
        """Raises if a kernel of this rank waited in vain; reads one host word, waits for nothing.

        Raises:
            RankTimeoutError: names the rank that waited, the row, the phase and the missing peer.
        """
        if self._status.state:
            raise _timed_out(self.id, self.group, self._status)

    def _launch_for(self, x: Tensor, output: Output) -> Any:
        self.check()
        launch = self._launches.get((x.shape, x.dtype, output))
        if launch is None:
            launch = self._first_launch(x, output)
        return launch

    def _first_launch(self, x: Tensor, output: Output) -> PreparedLaunch:
        if self._workspace.closed:
            raise UnavailableError(f"{self.id} of {self.group} is closed")
        shape = Shape(x.shape[0], x.shape[1], DTYPE_NAMES[x.dtype])  # type: ignore[arg-type]
        reason = self.admits(shape)
        if reason:
            raise InputError(f"{self.id} cannot run {shape}", got=reason)
        if len(self._launches) >= _MAX_PREPARED:
            self._launches.clear()
        launch = self._launches[x.shape, x.dtype, output] = self._prepare(shape, output)
        return launch

    @staticmethod
    def _fill(
        launch: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        total: Tensor,
        eps: float,
        weight_bias: float,
    ) -> None:
        x_at, weight_at = x.data_ptr(), weight.data_ptr()
        residual_at = 0 if residual is None else residual.data_ptr()
        if (x_at | weight_at | residual_at) & _MISALIGNED:
            raise _misaligned()
        parameters = launch.parameters
        parameters.x, parameters.residual, parameters.weight = x_at, residual_at, weight_at
        parameters.residual_out = total.data_ptr()
        parameters.eps, parameters.weight_bias = eps, weight_bias

    def _enqueue(self, launch: Any) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        if stream != self._last_stream:
            self._follow(stream)
        launch(stream)

    def _follow(self, stream: int) -> None:
        """Makes a new stream wait for the last one, whose kernels share our counters."""
        if not torch.cuda.is_current_stream_capturing():
            before: Any = _stream_at(self._last_stream, self.group.device)
            torch.cuda.current_stream(self.group.device).wait_stream(before)
        self._last_stream = stream

    def close(self) -> None:
        if self._workspace.closed:
            return
        self._workspace.close()
        self._launches.clear()


def _misaligned() -> InputError:
    return InputError("tensor not aligned", expected="addresses that are multiples of 16")


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
