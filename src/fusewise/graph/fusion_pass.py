"""The graph pass: visits every all-reduce once, decides, rewrites, and remembers why.

A ``FusionPass`` is what Inductor calls between the trace and its own passes; it works on any fx
graph of aten operators whose nodes carry fake values. It never runs a kernel and never talks to
another rank: ranks agree because their plans and their graphs are equal.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fusewise
from fusewise.backends.base import DTYPE_NAMES
from fusewise.graph.collectives import Reduction, reduction_at
from fusewise.graph.decide import Choice, decide
from fusewise.graph.nodes import UnlikeError, shape_text, token_range, value
from fusewise.graph.rewrite import fuse, replace_all_reduce
from fusewise.graph.sites import match
from fusewise.profiles.bands import Plan
from fusewise.shape import DType

if TYPE_CHECKING:
    from torch.fx import Graph

    from fusewise.run.communicator import Communicator

log = logging.getLogger("fusewise")


@dataclass(frozen=True)
class Site:
    """One all-reduce the pass met: in which graph, of what shape, what became of it and why."""

    graph: int
    node: str
    shape: str
    tokens: str
    choice: Choice
    why: str

    @property
    def rewritten(self) -> bool:
        """Whether the graph was changed here."""
        return self.choice != "leave"

    def __str__(self) -> str:
        return f"  {self.node:<20} {self.shape}, {self.tokens}: {self.choice} ({self.why})"


class FusionPass:
    """A custom Inductor pass bound to one group and its plans.

    Args:
        group: torch's name of the group, under which a communicator is registered.
        plans: what to do at which size, per dtype.
        group_names: further names under which graphs know the group, such as vLLM's ``"tp:0"``.
        device_type: where the communicator's tensors live; None: all-reduces of any device.
        communicator: kept alive as long as the pass is.
    """

    def __init__(
        self,
        group: str,
        plans: Mapping[DType, Plan],
        *,
        group_names: Collection[str] = (),
        device_type: str | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self.group = group
        self.group_names = frozenset({group, *group_names})
        self.plans: dict[str, Plan] = dict(plans.items())
        self.device_type = device_type
        self.communicator = communicator
        self.sites: list[Site] = []
        self.graphs = 0

    def __deepcopy__(self, memo: dict[int, object]) -> FusionPass:
        """Itself: Inductor copies its options, and a communicator cannot be copied."""
        return self

    def __call__(self, graph: Graph) -> None:
        """Rewrites the sites of one graph in place. Linear in the number of nodes."""
        before = len(self.sites)
        for node in list(graph.nodes):
            reduction = reduction_at(node)
            if reduction is not None:
                self.sites.append(self._visit(graph, reduction))
        self.graphs += 1
        met = self.sites[before:]
        log.info("%d of %d all-reduces rewritten", sum(s.rewritten for s in met), len(met))

    def _visit(self, graph: Graph, reduction: Reduction) -> Site:
        tensor = value(reduction.x)
        name = str(reduction.result.name)
        shape = shape_text(tensor) if tensor is not None else "shape unknown"

        def site(choice: Choice, why: str, tokens: str = "not looked at") -> Site:
            return Site(self.graphs, name, shape, tokens, choice, why)

        if reduction.group not in self.group_names:
            return site("leave", f"another group: {reduction.group!r}")
        if tensor is not None and self.device_type not in (None, tensor.device.type):
            return site("leave", f"on another device: {tensor.device}")
        try:
            found = match(reduction)
        except UnlikeError as unlike:
            return site("leave", str(unlike))
        assert tensor is not None  # match looked at it
        plan = self.plans.get(DTYPE_NAMES.get(tensor.dtype, ""))
        if plan is None:
            return site("leave", f"no plan for {tensor.dtype}")
        tokens = token_range(tensor)
        decision = decide(plan, int(tensor.shape[-1]), tokens, reduction.source == "torch")
        if decision.choice in ("fuse", "decide per call"):
            fuse(graph, found, self.group)
        elif decision.choice == "all_reduce only":
            replace_all_reduce(graph, reduction, self.group)
        return site(decision.choice, decision.why, str(tokens))

    def uuid(self) -> str:
        """What Inductor's caches key on: equal only for equal code, group names and plans."""
        digests = {dtype: plan.digest for dtype, plan in sorted(self.plans.items())}
        identity = [fusewise.__version__, _source(), self.group, sorted(self.group_names), digests]
        return "fusewise-" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def explain(self) -> str:
        """Every site of every graph compiled through this pass so far, and why."""
        if not self.graphs:
            return (
                "No graph was compiled through this pass yet. A graph that Inductor takes from "
                "its cache was rewritten when it was first compiled."
            )
        lines = []
        for number in range(self.graphs):
            sites = [site for site in self.sites if site.graph == number]
            done = sum(site.rewritten for site in sites)
            lines.append(f"graph {number}: {done} of {len(sites)} all-reduces rewritten")
            lines += map(str, sites)
        return "\n".join(lines)


@functools.cache
def _source() -> str:
    """SHA-256 of this package's files: another pass means other graphs."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
