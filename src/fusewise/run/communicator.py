"""Runs what the plan says: ``Communicator(group).all_reduce_rms_norm(x, residual, weight)``.

Rank 0 finds the profile and derives the plan; every rank receives it and all compare its digest
before the first message. Backends are built once, by vote: one that fails on any rank is left out
on all, and its sizes go to the baseline. After that a call is one dictionary lookup.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from fusewise.backends.base import select_variant, shape_of
from fusewise.backends.norm import residual_rms_norm
from fusewise.backends.registry import all_ids, baseline_id, select
from fusewise.backends.steps import build_backend
from fusewise.errors import InputError, UnavailableError
from fusewise.operation import Op, backend_of, unfused_path
from fusewise.profiles.bands import Band, Plan
from fusewise.profiles.schema import Profile
from fusewise.ranks.agreement import agreed_plans, fingerprint_of
from fusewise.ranks.group import Group
from fusewise.run import registry
from fusewise.run.border import ROWS, mismatch, rows_of, usable
from fusewise.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from fusewise.backends.base import Backend

log = logging.getLogger("fusewise")

_MAX_MESSAGE_BYTES = 64 * 2**20  # where the published engine tables end
_MAX_HIDDEN_SIZE = 8192
_MAX_ROUTES = 100_000  # decisions kept; one per shape seen


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
        if min(max_message_bytes, max_hidden_size, timeout_s) <= 0:
            raise InputError(
                "a bound is not positive",
                got=f"{max_message_bytes=}, {max_hidden_size=}, {timeout_s=}",
            )
        self.group = group if isinstance(group, Group) else Group(group, timeout_s=timeout_s)
        self.node = fingerprint_of(self.group)
        excluded = select([without] if isinstance(without, str) else without)
        self.group.agree(
            "settings", [self.group.name, sorted(excluded), max_message_bytes, max_hidden_size]
        )
        self._baseline = baseline_id(self.node.kind)
        default = unfused_path(self._baseline)
        self.plans, self.source = agreed_plans(self.group, self.node, profile, default, excluded)
        tokens = max(1, max_message_bytes // (2 * max_hidden_size))
        self._max_shape = Shape(tokens, max_hidden_size, "bfloat16")
        self._backends: dict[str, Backend] = {}
        self._routes: dict[tuple[Op, torch.Size, torch.dtype, bool, bool], Backend] = {}
        self._told: set[str] = set()
        while self.group.world_size > 1 and (failed := self._build(excluded)):
            # The best of the others takes the sizes of those that cannot be built.
            excluded |= failed
            self.plans, self.source = agreed_plans(
                self.group, self.node, profile, default, excluded
            )
        self.handle = registry.new_handle(self)  # what compiled graphs call this one

    def activate(self) -> None:
        """Makes this the communicator that operators find under the group's name.

        The one constructed last is it already; this is for taking turns. Graphs compiled with a
        communicator find it by its handle, whosever turn it is.
        """
        registry.activate(self)

    def _build(self, excluded: set[str]) -> set[str]:
        """Builds what the plans name and is missing; returns what failed, the same on all ranks."""
        named = {backend_of(path) for plan in self.plans.values() for path in plan.paths()}
        failures: set[str] = set()
        for backend_id in [self._baseline, *sorted(named - {self._baseline})]:
            if backend_id in self._backends or backend_id in excluded - {self._baseline}:
                continue
            if backend_id not in all_ids():
                self._tell(f"{self.source} names {backend_id}, which this version does not have")
                failures.add(backend_id)
                continue
            backend, failed = build_backend(backend_id, self.group, self.node, self._max_shape)
            if backend is not None:
                self._backends[backend_id] = backend
            elif backend_id == self._baseline:
                raise UnavailableError(f"the baseline {backend_id} cannot be built", got=failed)
            else:
                self._tell(f"{backend_id} is disabled on all ranks: {failed}")
                failures.add(backend_id)
        return failures

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` as a new tensor.

        Args:
            x: [..., hidden_size]; bf16, fp16 or fp32; on the group's device.

        Raises:
            InputError: another dtype or device, or a tensor that needs a gradient.
        """
        if torch.compiler.is_compiling():
            reduced: Tensor = torch.ops.fusewise.all_reduce(x, self._name_in_graph())
            return reduced
        rows = rows_of(x, "x", self.group.device)
        if self.group.world_size == 1 or rows.numel() == 0:
            return x.clone(memory_format=torch.contiguous_format)
        out = self._route("all_reduce", rows, False, False).all_reduce(rows)
        return out if x.ndim == ROWS else out.view(x.shape)

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """``s = all_reduce(x) + residual``; returns ``(rms_norm(s) · (weight + weight_bias), s)``.

        Args:
            x: [..., hidden_size]; bf16, fp16 or fp32; on the group's device.
            residual: the same shape and dtype, equal on all ranks; None adds nothing.
            weight: [hidden_size], the same dtype.
            eps: added to the mean square.
            weight_bias: 1.0 for Gemma's ``1 + weight``.

        Returns:
            Two new tensors like ``x``, bit-identical on all ranks.

        Raises:
            InputError: shapes, dtypes or devices do not fit together.
        """
        if torch.compiler.is_compiling():
            both: tuple[Tensor, Tensor] = torch.ops.fusewise.all_reduce_rms_norm(
                x, residual, weight, eps, weight_bias, self._name_in_graph()
            )
            return both
        rows = rows_of(x, "x", self.group.device)
        if residual is not None:
            if residual.shape != x.shape or residual.dtype != x.dtype:
                raise mismatch("residual", residual, x.shape, x.dtype)
            residual = rows_of(residual, "residual", self.group.device)
        if weight.ndim != 1 or weight.numel() != rows.shape[1] or weight.dtype != x.dtype:
            raise mismatch("weight", weight, rows.shape[1:], x.dtype)
        weight = usable(weight, "weight", self.group.device)
        if self.group.world_size == 1 or rows.numel() == 0:
            out, total = residual_rms_norm(rows, residual, weight, eps, weight_bias)
            total = total.clone() if residual is None else total
        else:
            backend = self._route("all_reduce_rms_norm", rows, residual is None, weight_bias != 0.0)
            out, total = backend.all_reduce_rms_norm(rows, residual, weight, eps, weight_bias)
        if x.ndim == ROWS:
            return out, total
        return out.view(x.shape), total.view(x.shape)

    def decide(self, op: Op, shape: Shape) -> Band:
        """The band that answers for a shape, as the plan has it (``explain`` prints the same)."""
        return self.plans[shape.dtype].band_at(op, shape.hidden_size, shape.message_bytes)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Around a CUDA graph capture: afterwards backends register the graph's buffers.

        Collective at exit, also when the capture failed. A graph captured outside of it is right
        too; backends that would read peers' tensors in place then copy into their own buffer.
        """
        with contextlib.ExitStack() as stack:
            for backend in self._backends.values():
                stack.enter_context(backend.capture())
            yield

    def check(self) -> None:
        """Asks every backend whether a kernel gave up waiting for a peer; costs no synchronisation.

        Calls ask by themselves. Replays of a CUDA graph pass by this class: ask after them.

        Raises:
            RankTimeoutError: names the rank that waited and the one that did not come.
        """
        for backend in self._backends.values():
            backend.check()

    def _name_in_graph(self) -> str:
        """The handle; in an exported program the group's name, which other processes know."""
        return self.group.name if torch.compiler.is_exporting() else self.handle

    def _route(self, op: Op, rows: Tensor, bare: bool, biased: bool) -> Backend:
        key = (op, rows.shape, rows.dtype, bare, biased)
        found = self._routes.get(key)
        if found is None:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            found = self._routes[key] = self._choose(op, shape_of(rows), bare, biased)
        return found

    def _choose(self, op: Op, shape: Shape, bare: bool, biased: bool) -> Backend:
        if not self._backends:
            raise UnavailableError("this communicator is closed", hint="Create a new one.")
        band = self.decide(op, shape)
        backend = self._backends.get(backend_of(band.path))
        if backend is None:
            return self._backends[self._baseline]
        refused = backend.admits(shape)
        if op == "all_reduce" and not backend.plain:
            refused = "it offers no plain all_reduce"
        elif op == "all_reduce_rms_norm" and bare and not backend.takes_no_residual:
            refused = "it needs a residual"
        elif op == "all_reduce_rms_norm" and biased and not backend.takes_weight_bias:
            refused = "it takes no weight bias"
        if refused:
            self._tell(f"{band.path} does not take {shape}: {refused}; {self._baseline} runs")
            return self._backends[self._baseline]
        if reason := select_variant(backend, op, shape, band.path):
            self._tell(f"{band.path} at {shape}: {reason}; {backend.id} runs")
        return backend

    def _tell(self, message: str) -> None:
        """One warning per message, from the group's first rank."""
        if message not in self._told:
            self._told.add(message)
            if self.group.rank == 0:
                log.warning("%s: %s", self.group, message)

    def close(self) -> None:
        """Closes every backend on all ranks, then raises the first error. Safe to call twice."""
        errors: list[Exception] = []
        for backend in self._retire():
            try:
                backend.close()
            except Exception as error:  # the other backends' buffers must still be given back
                errors.append(error)
        if errors:
            raise errors[0]

    def _retire(self) -> list[Backend]:
        backends, self._backends = list(self._backends.values()), {}
        self._routes.clear()
        registry.retire(self)
        return backends

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        # Closing is collective. A rank on its way out with an error must not wait for its peers.
        if kind is None:
            self.close()
        else:
            self._retire()
