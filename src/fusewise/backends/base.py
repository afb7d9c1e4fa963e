"""The protocol every provider implements, and the checks shared by all.

A backend answers two questions it must not mix up with a third: *can it run on this node*
(``available``), *can it run this shape* (``admits``); whether it *should* is the plan's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fusewise.backends.norm import residual_rms_norm
from fusewise.errors import InputError
from fusewise.operation import Op, unfused_path, variant_of
from fusewise.profiles.schema import Numerics, PathRecord
from fusewise.shape import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from fusewise.backends.native.fp8 import Fp8, Fp8Result
    from fusewise.errors import RankTimeoutError
    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class Backend(ABC):
    """One way to all-reduce, or to do all-reduce, residual and RMSNorm at once.

    Constructing one is collective: every rank of the group builds the same backends in the same
    order, each within ``group.timeout_s``, and ``close`` is collective likewise.

    Args:
        group: the ranks.
        max_shape: the largest message and the widest row the workspaces must hold.

    Raises:
        UnavailableError: it cannot be built here; the message says what to do.
    """

    id: ClassVar[str]
    provider: ClassVar[str]
    fused: ClassVar[bool] = False
    numerics: ClassVar[Numerics]
    plain: ClassVar[bool] = True  # offers all_reduce
    takes_no_residual: ClassVar[bool] = True
    capturable: ClassVar[bool] = True  # in a CUDA graph, where the place has graphs at all
    takes_weight_bias: bool = True  # an instance may know better once its provider is loaded

    def __init__(self, group: Group, max_shape: Shape) -> None:
        self.group = group
        self.max_shape = max_shape

    @classmethod
    @abstractmethod
    def available(cls, node: Fingerprint) -> str | None:
        """None if it can run on that node in this process, else the reason and the remedy."""

    def admits(self, shape: Shape) -> str | None:
        """None if this shape can run, else the reason. Must answer alike on all ranks."""
        if shape.message_bytes > self.max_shape.message_bytes:
            return (
                f"needs {shape.message_bytes} bytes of workspace, has "
                f"{self.max_shape.message_bytes}"
            )
        return None

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` as a new tensor; ``x`` keeps its value.

        Args:
            x: contiguous, [num_tokens, hidden_size], bf16, fp16 or fp32, on the group's device.
        """

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """``(norm, sum + residual)``; unfused backends compose it from ``all_reduce``.

        Args:
            x: as in ``all_reduce``.
            residual: like ``x``, or None.
            weight: [hidden_size], the dtype of ``x``.
            eps: added to the mean square.
            weight_bias: 1.0 for Gemma's ``1 + weight``.

        Returns:
            Two new tensors like ``x``.
        """
        return residual_rms_norm(self.all_reduce(x), residual, weight, eps, weight_bias)

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
        """As ``all_reduce_rms_norm``, with the norm quantised to FP8 e4m3.

        The quantised values equal ``native.fp8.quantise`` of the norm, which most backends call.

        Args:
            x, residual, weight, eps, weight_bias: as ``all_reduce_rms_norm``.
            fp8: how to scale, and whether the norm is wanted too.
            static_scale: one fp32 number on the device, with ``scaling="static"`` only.

        Raises:
            InputError: the scale does not fit ``fp8``.
        """
        norm, total = self.all_reduce_rms_norm(x, residual, weight, eps, weight_bias)
        return fp8.result_of(norm, total, static_scale)

    def prepared(self, op: Op, shape: Shape) -> Callable[..., Any] | None:
        """``all_reduce`` or ``all_reduce_rms_norm`` for one shape, with everything looked up.

        What it returns takes contiguous tensors of that many rows in any number of dimensions, its
        ``weight_bias`` always given, and serves as long as the backend is open. None where there is
        nothing to prepare.

        Raises:
            InputError: the backend does not admit the shape.
        """
        return None

    def variants(self, shape: Shape) -> tuple[str, ...]:
        """Names of configurations worth measuring beside the default at this shape."""
        return ()

    def select(self, op: Op, shape: Shape, variant: str) -> None:
        """Makes calls of one operation and shape run a variant from now on; "" is the default.

        Every rank selects the same. Graphs captured before keep what they captured.

        Raises:
            InputError: there is no such variant, or it does not take the shape.
        """
        if variant:
            raise InputError(f"{self.id} has no variants", got=f"{variant!r} for {op} at {shape}")

    def capture_begin(self) -> None:  # noqa: B027  most have nothing to register
        """Called on all ranks before a CUDA graph capture that ``capture_end`` will follow."""

    def capture_end(self) -> None:  # noqa: B027  most have nothing to register
        """Called on all ranks after a CUDA graph was captured; backends register buffers here."""

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around a CUDA graph capture. Collective at exit, also when the capture failed."""
        self.capture_begin()
        try:
            yield
        finally:
            self.capture_end()

    def check(self) -> None:  # noqa: B027  most fail in the call itself
        """Raises RankTimeoutError if a kernel gave up waiting, also one of a replayed graph."""

    def on_death(  # noqa: B027  most have no kernel that can wait in vain
        self, tell: Callable[[RankTimeoutError], None]
    ) -> None:
        """Calls ``tell`` once, from another thread, when ``check`` would raise; replays too."""

    def close(self) -> None:  # noqa: B027  most own nothing
        """Gives back every buffer and handle. Collective; safe to call twice."""

    @classmethod
    def path_name(cls, op: Op = "all_reduce_rms_norm") -> str:
        """An operation's path: ``flashinfer.one_shot`` or ``nccl + rms_norm``."""
        return cls.id if cls.fused else unfused_path(cls.id, op)

    @classmethod
    def record(cls) -> PathRecord:
        """How a profile describes this path."""
        return PathRecord(
            name=cls.path_name(), provider=cls.provider, fused=cls.fused, numerics=cls.numerics
        )


def shape_of(x: Tensor) -> Shape:
    """The shape of a checked two-dimensional tensor."""
    return Shape(x.shape[0], x.shape[1], DTYPE_NAMES[x.dtype])  # type: ignore[arg-type]


def select_variant(backend: Backend, op: Op, shape: Shape, path: str) -> str | None:
    """Selects the variant that a path names; the reason if the default must run instead."""
    name = variant_of(path)
    if not name:
        return None
    try:
        backend.select(op, shape, name)
    except InputError as error:
        return str(error)
    return None
