"""Runs what the plan says: ``Communicator(group).all_reduce_rms_norm(x, residual, weight)``.

Rank 0 finds the profile and derives the plan; every rank receives it and all compare its digest
before the first message. After that a call is a look at its tensors and what the backend prepared
for the shape; a dictionary lookup besides where they differ from the last call's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch.compiler import is_compiling

from fusewise.backends.native.fp8 import Fp8, Fp8Result, check_static_scale
from fusewise.backends.registry import select
from fusewise.errors import InputError
from fusewise.operation import Op, known_op
from fusewise.profiles.bands import Band, Plan
from fusewise.profiles.schema import Profile
from fusewise.ranks.agreement import fingerprint_of
from fusewise.ranks.group import Group
from fusewise.run import registry
from fusewise.run.border import ROWS, check_bounds, no_tensor, operands, rows_of
from fusewise.run.debug import compare_calls, described
from fusewise.run.paths import Paths
from fusewise.run.runs import SUM, Runs, alone
from fusewise.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

_MAX_MESSAGE_BYTES = 64 * 2**20  # where the published engine tables end
_MAX_HIDDEN_SIZE = 8192


class Communicator:
    """The operations of one tensor-parallel group, each run by the path the plan names.

    Constructing and closing are collective. Calls are collective too: every rank makes the same
    calls with equal shapes in the same order, from one stream. Inference only.

    Args:
        group: torch's process group, or None for the default group.
        profile: a ``Profile``, a path, or a packaged profile's name; None searches for the
            node's own; or a ``Plan`` to run as it is. Ranks must agree.
        without: backends or providers never to use, such as ``["native"]``.
        max_message_bytes: what workspaces are sized for; larger messages run on the baseline.
        max_hidden_size: the widest row.
        timeout_s: bound of every wait between ranks on the host, and of our kernels on the device;
            NCCL keeps its process group's own.

    Raises:
        DisagreementError: ranks were given different profiles or settings.
        ProfileError, StaleProfileError: the profile passed is broken or of another node.
        UnavailableError: no process group, or the baseline cannot be built.
    """

    def __init__(
        self,
        group: ProcessGroup | Group | None = None,
        profile: Profile | Plan | str | os.PathLike[str] | None = None,
        *,
        without: Sequence[str] = (),
        max_message_bytes: int = _MAX_MESSAGE_BYTES,
        max_hidden_size: int = _MAX_HIDDEN_SIZE,
        timeout_s: float = 120.0,
    ) -> None:
        check_bounds(max_message_bytes, max_hidden_size, timeout_s)
        self.group = group if isinstance(group, Group) else Group(group, timeout_s=timeout_s)
        self.node = fingerprint_of(self.group)
        excluded = select([without] if isinstance(without, str) else without)
        self.group.agree(
            "settings", [self.group.name, sorted(excluded), max_message_bytes, max_hidden_size]
        )
        tokens = max(1, max_message_bytes // (2 * max_hidden_size))
        max_shape = Shape(tokens, max_hidden_size, "bfloat16")
        self._paths = Paths(self.group, self.node, profile, excluded, max_shape)
        self.plans, self.source = self._paths.plans, self._paths.source
        self._device = self.group.device
        self._runs = Runs(self._paths, self._device)
        self.handle = registry.new_handle(self)  # what compiled graphs call this one
        compare_calls(self)

    def __repr__(self) -> str:
        return described(self)

    def activate(self) -> None:
        """Makes this the communicator that operators find under the group's name.

        The one constructed last is it already; this is for taking turns. Graphs compiled with a
        communicator find it by its handle, whosever turn it is.
        """
        registry.activate(self)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` as a new tensor.

        Args:
            x: [..., hidden_size]; bf16, fp16 or fp32; on the group's device.

        Raises:
            InputError: another dtype or device, or a tensor that needs a gradient.
        """
        if is_compiling():
            reduced: Tensor = torch.ops.fusewise.all_reduce(x, self._name_in_graph())
            return reduced
        latest = self._runs.latest[SUM]
        if latest.seen(x):
            summed: Tensor = latest.call(x)
            return summed
        try:
            shape = x.shape
        except AttributeError:
            raise no_tensor("x", x) from None
        run = self._runs.get((shape, x.dtype))
        if run is not None and (run.seen(x) or run.takes(x)):
            self._runs.remember(SUM, run)
            return run.call(x)  # type: ignore[no-any-return]
        rows = rows_of(x, "x", self._device)
        if self.group.world_size == 1 or rows.numel() == 0:
            return x.clone(memory_format=torch.contiguous_format)
        summed = self._runs.of("all_reduce", x, rows).call(rows)
        return summed if x.ndim == ROWS else summed.view(shape)

    @overload
    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = ...,
        weight_bias: float = ..., fp8: None = ..., static_scale: None = ...,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = ...,
        weight_bias: float = ..., *, fp8: Fp8, static_scale: Tensor | None = ...,
    ) -> Fp8Result: ...  # fmt: skip

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
        fp8: Fp8 | None = None,
        static_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Fp8Result:
        """``s = all_reduce(x) + residual``; returns ``(rms_norm(s) · (weight + weight_bias), s)``.

        Args:
            x: [..., hidden_size]; bf16, fp16 or fp32; on the group's device.
            residual: the same shape and dtype, equal on all ranks; None adds nothing.
            weight: [hidden_size], the same dtype.
            eps: added to the mean square.
            weight_bias: 1.0 for Gemma's ``1 + weight``.
            fp8: quantise the norm, in the same kernel where the plan's path is one of ours.
            static_scale: one fp32 number on the device, with ``Fp8("static")`` only.

        Returns:
            Two new tensors like ``x``, bit-identical on all ranks; with ``fp8`` an ``Fp8Result``,
            whose scales have the leading dimensions of ``x``.

        Raises:
            InputError: shapes, dtypes or devices do not fit together, or the scale not ``fp8``.
        """
        if fp8 is not None:
            return self.quantised_norm(x, residual, weight, eps, weight_bias, fp8, static_scale)
        if static_scale is not None:
            raise InputError("a static_scale without fp8", expected="fp8=Fp8('static')")
        if is_compiling():
            both: tuple[Tensor, Tensor] = torch.ops.fusewise.all_reduce_rms_norm(
                x, residual, weight, eps, weight_bias, self._name_in_graph()
            )
            return both
        return self.untraced_norm(x, residual, weight, eps, weight_bias)

    def untraced_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float
    ) -> tuple[Tensor, Tensor]:
        """``all_reduce_rms_norm`` where nothing is traced: the operator's kernel too."""
        bare, biased = residual is None, weight_bias != 0.0
        latest = self._runs.latest[2 * bare + biased]
        if latest.seen(x, weight) if bare else latest.seen(x, weight, residual):
            results: tuple[Tensor, Tensor] = latest.call(x, residual, weight, eps, weight_bias)
            return results
        return self._found(x, residual, weight, eps, weight_bias)

    def _found(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float
    ) -> tuple[Tensor, Tensor]:
        """``all_reduce_rms_norm`` of tensors unlike those of the last call."""
        try:
            shape = x.shape
        except AttributeError:
            raise no_tensor("x", x) from None
        bare, biased = residual is None, weight_bias != 0.0
        run = self._runs.get((shape, x.dtype, bare, biased))
        if run is not None and (
            (run.seen(x, weight) if bare else run.seen(x, weight, residual))
            or (isinstance(weight, torch.Tensor) and run.takes(x, weight, residual))
        ):
            self._runs.remember(2 * bare + biased, run)
            results: tuple[Tensor, Tensor] = run.call(x, residual, weight, eps, weight_bias)
            return results
        rows, residual, weight = operands(x, residual, weight, eps, self._device)
        if self.group.world_size == 1 or rows.numel() == 0:
            out, total = alone(rows, residual, weight, eps, weight_bias)
        else:
            run = self._runs.of("all_reduce_rms_norm", x, rows, bare, biased)
            out, total = run.call(rows, residual, weight, eps, weight_bias)
        return (out, total) if x.ndim == ROWS else (out.view(shape), total.view(shape))

    def quantised_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        fp8: Fp8,
        static_scale: Tensor | None,
    ) -> Fp8Result:
        """``all_reduce_rms_norm`` with ``fp8``, by the backend that the plan names for the norm."""
        if is_compiling():
            quantised, scales, total, norm = torch.ops.fusewise.all_reduce_rms_norm_fp8(
                x, residual, weight, eps, weight_bias, fp8.scaling, static_scale, fp8.keep_norm,
                self._name_in_graph(),
            )  # fmt: skip
            scales = scales if static_scale is None else static_scale
            return Fp8Result(quantised, scales, total, norm if fp8.keep_norm else None)
        check_static_scale(fp8, static_scale, self._device)
        kind = residual is None, weight_bias != 0.0
        rows, residual, weight = operands(x, residual, weight, eps, self._device)
        if self.group.world_size == 1 or rows.numel() == 0:
            result = fp8.result_of(*alone(rows, residual, weight, eps, weight_bias), static_scale)
        else:
            call = self._runs.of("all_reduce_rms_norm", x, rows, *kind, True).call
            result = call(rows, residual, weight, eps, fp8, weight_bias, static_scale)
        return result if x.ndim == ROWS else result.in_shape(x.shape)

    def decide(self, op: Op, shape: Shape) -> Band:
        """The band that answers for a shape, as the plan has it (``explain`` prints the same)."""
        if not isinstance(shape, Shape):
            raise InputError("shape", expected="a fusewise.Shape", got=repr(shape))
        return self._paths.decide(known_op(op), shape)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Around a CUDA graph capture: afterwards backends register the graph's buffers.

        Collective at exit, also when the capture failed. A graph captured outside of it is right
        too; backends that would read peers' tensors in place then copy into their own buffer.
        """
        with self._paths.capture():
            yield

    def check(self) -> None:
        """Asks every backend whether a kernel gave up waiting for a peer; costs no synchronisation.

        Calls ask by themselves, and a watchdog logs it, also where only graphs are replayed; a
        replay itself cannot raise.

        Raises:
            RankTimeoutError: names the rank that waited and the one that did not come.
        """
        self._paths.check()

    def _name_in_graph(self) -> str:
        """The handle; in an exported program the group's name, which other processes know."""
        return self.group.name if torch.compiler.is_exporting() else self.handle

    def close(self) -> None:
        """Closes every backend on all ranks, then raises the first error. Safe to call twice."""
        self._forget()
        self._paths.close()

    def _forget(self) -> None:
        self._runs.clear()
        registry.retire(self)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        # Closing is collective. A rank on its way out with an error must not wait for its peers.
        if kind is None:
            self.close()
        else:
            self._forget()
            self._paths.retire()
