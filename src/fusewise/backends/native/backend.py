"""What our own kernels share on the host: availability, workspace, one prepared launch per shape.

Building, room and launches are here; what a call does with its launch is in ``calls.py``, what the
kernels do and why it is right in ``cuda/*.cuh`` and ``docs/kernels.md``.

All calls of one backend must come in one order on all ranks, as with every collective.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fusewise.backends.base import Backend, shape_of
from fusewise.backends.native.calls import Call, Lane
from fusewise.backends.native.cuda.build import missing_compiler
from fusewise.backends.native.cuda.launch import Kernels, PreparedLaunch
from fusewise.backends.native.cuda.prepare import group_params
from fusewise.backends.native.fp8 import Fp8, Fp8Result, check_static_scale
from fusewise.backends.native.watchdog import Pulse
from fusewise.backends.native.workspace import SlotLayout, Workspace
from fusewise.backends.steps import not_on_one_host, together
from fusewise.errors import FusewiseError, InputError, RankTimeoutError, UnavailableError
from fusewise.profiles.schema import Numerics
from fusewise.shape import Shape

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

    from torch import Tensor

    from fusewise.backends.native.instance import Output
    from fusewise.backends.native.variants import LaunchShape
    from fusewise.node import Fingerprint
    from fusewise.operation import Op
    from fusewise.ranks.group import Group

_MAX_PREPARED = 4096  # calls kept, one per number of tokens and kind of output; near 2 KB each
_SM_FP8 = 89
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
        self._pulse = Pulse(self.id, group, self._workspace.status)
        self._lane = Lane(group, self._pulse)
        self._calls: dict[tuple[torch.Size, torch.dtype, Output], Call] = {}
        self._selected: dict[tuple[bool, Shape], str] = {}  # variants, by (fused, shape)
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
            self._calls.clear()
            self.max_shape = max(self.max_shape, max_shape, key=lambda s: s.message_bytes)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._call_for(x, "kSum").sum(x)

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        return self._call_for(x, "kNorm").norm(x, residual, weight, eps, weight_bias)

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
        call = self._call_for(x, "kNorm")
        call.norm_into(norm, total, x, residual, weight, eps, weight_bias)

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
        """In the same kernel from sm_89 on, which brought e4m3; else with a quantiser behind it."""
        if self._kernels.sm < _SM_FP8:
            return super().all_reduce_rms_norm_fp8(
                x, residual, weight, eps, fp8, weight_bias, static_scale
            )
        check_static_scale(fp8, static_scale, x.device)
        result = fp8.empty_result(x, static_scale)
        call = self._call_for(x, _OUTPUTS[fp8.scaling])
        call.fp8_into(result, x, residual, weight, eps, weight_bias)
        return result

    def prepared(self, op: Op, shape: Shape) -> Callable[..., Any]:
        if op == "all_reduce":
            return self._first_call(shape, "kSum").sum
        return self._first_call(shape, "kNorm").norm

    def check(self) -> None:
        self._pulse.check()

    def on_death(self, tell: Callable[[RankTimeoutError], None]) -> None:
        self._pulse.on_death(tell)

    def _call_for(self, x: Tensor, output: Output) -> Call:
        call = self._calls.get((x.shape, x.dtype, output))
        if call is None:
            shape = shape_of(x)
            call = self._calls[x.shape, x.dtype, output] = self._first_call(shape, output)
        return call

    def _first_call(self, shape: Shape, output: Output) -> Call:
        self.check()
        if self._workspace.closed:
            raise UnavailableError(f"{self.id} of {self.group} is closed")
        reason = self.admits(shape)
        if reason:
            raise InputError(f"{self.id} cannot run {shape}", got=reason)
        if len(self._calls) >= _MAX_PREPARED:
            self._calls.clear()
        return Call(self._prepare(shape, output), self._lane)

    def close(self) -> None:
        if self._workspace.closed:
            return
        self._pulse.close()
        self._workspace.close()
        self._calls.clear()
