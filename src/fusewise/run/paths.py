"""The backends of a communicator: built by vote after the plans, chosen by them shape by shape.

A backend that fails on any rank is left out on all, and the best of the others takes its sizes.
Looks at shapes, never at a tensor.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fusewise.backends.base import select_variant
from fusewise.backends.registry import all_ids, baseline_id
from fusewise.backends.steps import build_backend
from fusewise.errors import UnavailableError
from fusewise.operation import backend_of, unfused_path
from fusewise.ranks.agreement import agreed_plans

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from fusewise.backends.base import Backend
    from fusewise.errors import RankTimeoutError
    from fusewise.node import Fingerprint
    from fusewise.operation import Op
    from fusewise.profiles.bands import Band, Plan
    from fusewise.profiles.schema import Profile
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

log = logging.getLogger("fusewise")


class Paths:
    """What a group can run, and what it runs at each shape. Constructing and closing: collective.

    Args:
        group: the ranks.
        node: their fingerprint.
        profile: as the communicator was given it.
        excluded: backends never to use.
        max_shape: what workspaces are sized for.

    Raises:
        UnavailableError: the baseline cannot be built.
        DisagreementError, ProfileError, StaleProfileError: as ``agreed_plans``.
    """

    def __init__(
        self,
        group: Group,
        node: Fingerprint,
        profile: Profile | Plan | str | os.PathLike[str] | None,
        excluded: set[str],
        max_shape: Shape,
    ) -> None:
        self.group, self.node = group, node
        self._baseline, self._max_shape = baseline_id(node.kind), max_shape
        self.backends: dict[str, Backend] = {}
        self._told: set[str] = set()
        default = unfused_path(self._baseline)
        self.plans, self.source = agreed_plans(group, node, profile, default, excluded)
        while group.world_size > 1 and (failed := self._build(excluded)):
            # The best of the others takes the sizes of those that cannot be built.
            excluded |= failed
            self.plans, self.source = agreed_plans(group, node, profile, default, excluded)

    def _build(self, excluded: set[str]) -> set[str]:
        """Builds what the plans name and is missing; returns what failed, the same on all ranks."""
        named = {backend_of(path) for plan in self.plans.values() for path in plan.paths()}
        failures: set[str] = set()
        for backend_id in [self._baseline, *sorted(named - {self._baseline})]:
            if backend_id in self.backends or backend_id in excluded - {self._baseline}:
                continue
            if backend_id not in all_ids():
                self._tell(f"{self.source} names {backend_id}, which this version does not have")
                failures.add(backend_id)
                continue
            backend, failed = build_backend(backend_id, self.group, self.node, self._max_shape)
            if backend is not None:
                self.backends[backend_id] = backend
            elif backend_id == self._baseline:
                raise UnavailableError(f"the baseline {backend_id} cannot be built", got=failed)
            else:
                self._tell(f"{backend_id} is disabled on all ranks: {failed}")
                failures.add(backend_id)
        return failures

    def decide(self, op: Op, shape: Shape) -> Band:
        """The band that answers for a shape."""
        return self.plans[shape.dtype].band_at(op, shape.hidden_size, shape.message_bytes)

    def choose(self, op: Op, shape: Shape, bare: bool = False, biased: bool = False) -> Backend:
        """The backend that runs a shape, in the variant that the plan names.

        Args:
            op: the operation.
            shape: of its message.
            bare: without a residual.
            biased: with a weight bias.
        """
        if not self.backends:
            raise UnavailableError("this communicator is closed", hint="Create a new one.")
        band = self.decide(op, shape)
        backend = self.backends.get(backend_of(band.path))
        if backend is None:
            return self.backends[self._baseline]
        refused = backend.admits(shape)
        if op == "all_reduce" and not backend.plain:
            refused = "it offers no plain all_reduce"
        elif op == "all_reduce_rms_norm" and bare and not backend.takes_no_residual:
            refused = "it needs a residual"
        elif op == "all_reduce_rms_norm" and biased and not backend.takes_weight_bias:
            refused = "it takes no weight bias"
        if refused:
            self._tell(f"{band.path} does not take {shape}: {refused}; {self._baseline} runs")
            return self.backends[self._baseline]
        if reason := select_variant(backend, op, shape, band.path):
            self._tell(f"{band.path} at {shape}: {reason}; {backend.id} runs")
        return backend

    def _tell(self, message: str) -> None:
        """One warning per message, from the group's first rank."""
        if message not in self._told:
            self._told.add(message)
            if self.group.rank == 0:
                log.warning("%s: %s", self.group, message)

    def capture(self) -> ExitStack:
        """Around a CUDA graph capture: every backend's."""
        stack = ExitStack()
        for backend in self.backends.values():
            stack.enter_context(backend.capture())
        return stack

    def on_death(self, tell: Callable[[RankTimeoutError], None]) -> None:
        """Calls ``tell`` from another thread once a backend is dead, also in a graph's replay."""
        for backend in self.backends.values():
            backend.on_death(tell)

    def check(self) -> None:
        """Every backend's; raises the first error."""
        for backend in self.backends.values():
            backend.check()

    def close(self) -> None:
        """Closes every backend on all ranks, then raises the first error. Safe to call twice."""
        errors: list[Exception] = []
        for backend in self.retire():
            try:
                backend.close()
            except Exception as error:  # the other backends' buffers must still be given back
                errors.append(error)
        if errors:
            raise errors[0]

    def retire(self) -> list[Backend]:
        """Takes the backends away, open as they are: no call finds one any more."""
        backends, self.backends = list(self.backends.values()), {}
        return backends
