"""The graph pass: looks at every all-reduce once, decides, lets the ranks compare, then rewrites.

A ``FusionPass`` works on any fx graph of aten operators whose nodes carry fake values. It never
runs a kernel. It says in the log what it did, and remembers why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fusewise.backends.base import DTYPE_NAMES
from fusewise.graph.agreement import Agreement
from fusewise.graph.collectives import Reduction, reduction_at
from fusewise.graph.decide import Choice, decide
from fusewise.graph.nodes import UnlikeError, dtype_text, shape_text, token_range, value
from fusewise.graph.rewrite import fuse, replace_all_reduce
from fusewise.graph.sites import Match, match
from fusewise.graph.sums import Rules
from fusewise.profiles.bands import Plan
from fusewise.shape import DType

if TYPE_CHECKING:
    from torch.fx import Graph, Node

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
    fp8: str = ""  # the scaling of an FP8 quantisation that goes with it

    @property
    def rewritten(self) -> bool:
        """Whether the graph was changed here."""
        return self.choice != "leave"

    def __str__(self) -> str:
        also = f" + fp8 ({self.fp8})" if self.fp8 else ""
        return f"  {self.node:<20} {self.shape}, {self.tokens}: {self.choice}{also} ({self.why})"


class FusionPass:
    """A custom Inductor pass bound to one group and its plans.

    Args:
        group: what rewritten graphs call the communicator: its handle, or torch's group name.
        plans: what to do at which size, per dtype.
        group_names: names under which graphs know the group, such as vLLM's ``"tp:0"``.
        device_type: where the communicator's tensors live; None: all-reduces of any device.
        communicator: kept alive as long as the pass is; its ranks agree on every graph.
        scale_first: a factor behind an all-reduce may be applied before it though it is no power
            of two: one rounding more, on each rank's part instead of the sum.
    """

    def __init__(
        self,
        group: str,
        plans: Mapping[DType, Plan],
        *,
        group_names: Collection[str] = (),
        device_type: str | None = None,
        communicator: Communicator | None = None,
        scale_first: bool = False,
    ) -> None:
        self.group = group
        self.group_names = frozenset({group, *group_names})
        self.plans: dict[str, Plan] = dict(plans.items())
        self.device_type = device_type
        self.communicator = communicator
        self.rules = Rules(self.group_names, scale_first)
        self.sites: list[Site] = []
        self.graphs = 0
        self._agreement = Agreement(communicator.group if communicator is not None else None)

    def __deepcopy__(self, memo: dict[int, object]) -> FusionPass:
        """Itself: Inductor copies its options, and a communicator cannot be copied."""
        return self

    def __call__(self, graph: Graph) -> None:
        """Rewrites the sites of one graph in place. Linear in the number of nodes."""
        self.rewrite(graph)

    def rewrite(self, graph: Graph, inference: bool = True) -> None:
        """The same; a graph with a backward half (``inference`` False) is only looked at."""
        reductions = [found for node in graph.nodes if (found := reduction_at(node)) is not None]
        sites = self._look(reductions)
        if not inference:
            sites = [_left(site, "a training graph") for site in sites]
        if not self._agreement.reached([(site.node, _kind(site)) for site in sites]):
            sites = [_left(site, "the ranks' graphs differ") for site in sites]
        for reduction, site in zip(reductions, sites, strict=True):
            if _kind(site) == "fuse":
                fuse(graph, match(_again(reduction), self.rules), self.group, bool(site.fp8))
            elif site.choice == "all_reduce only":
                replace_all_reduce(graph, _again(reduction), self.group)
        self.sites += sites
        self.graphs += 1
        self._tell(sites)

    def _look(self, reductions: list[Reduction]) -> list[Site]:
        """What is to become of each all-reduce of a graph; nothing is changed yet."""
        sites: list[Site] = []
        joined: dict[Node, Site] = {}
        for reduction in reductions:
            site = joined.get(reduction.result)
            if site is None:
                site, found = self._visit(reduction)
                others = found.parts.reductions[1:] if found is not None else ()
                choice: Choice = "join" if _kind(site) == "fuse" else "leave"
                for other in others:
                    why = f"summed with {site.node}" if choice == "join" else site.why
                    node = str(other.result.name)
                    joined[other.result] = replace(site, node=node, choice=choice, why=why, fp8="")
            sites.append(site)
        return sites

    def _visit(self, reduction: Reduction) -> tuple[Site, Match | None]:
        tensor = value(reduction.x)
        shape = shape_text(tensor) if tensor is not None else "shape unknown"
        site = Site(self.graphs, str(reduction.result.name), shape, "not looked at", "leave", "")
        if reduction.group not in self.group_names:
            return replace(site, why=f"another group: {reduction.group!r}"), None
        if tensor is not None and self.device_type not in (None, tensor.device.type):
            return replace(site, why=f"on another device: {tensor.device}"), None
        try:
            found = match(reduction, self.rules)
        except UnlikeError as unlike:
            return replace(site, why=str(unlike)), None
        assert tensor is not None  # match looked at it
        plan = self.plans.get(DTYPE_NAMES.get(found.dtype, ""))
        if plan is None:
            return replace(site, why=f"no plan for {dtype_text(found.dtype)}"), None
        tokens = token_range(tensor)
        torchs = reduction.source == "torch" and len(found.parts.reductions) == 1
        torchs = torchs and found.dtype == tensor.dtype
        decision = decide(plan, int(tensor.shape[-1]), tokens, torch_reduces=torchs)
        fp8 = found.quantiser.scaling if found.quantiser and decision.quantises else ""
        site = replace(site, tokens=str(tokens), choice=decision.choice, why=decision.why, fp8=fp8)
        return site, found

    def _tell(self, sites: list[Site]) -> None:
        """One line about a graph: a warning where it all-reduces and nothing was done about it."""
        if not sites or (self.communicator is not None and self.communicator.group.rank):
            return
        done = sum(site.rewritten for site in sites)
        reasons = Counter(site.why for site in sites if not site.rewritten)
        left = "; ".join(f"{count} left: {why}" for why, count in reasons.most_common())
        level = logging.INFO if done else logging.WARNING
        words = f"{done} of {len(sites)} all-reduces rewritten{'; ' if left else ''}{left}"
        log.log(level, "graph %d: %s", self.graphs - 1, words)

    def uuid(self) -> None:
        """None: Inductor's hook lies behind its caches, where a hit on one rank would go unseen."""

    def explain(self) -> str:
        """Every site of every graph compiled through this pass so far, and why."""
        if not self.graphs:
            return (
                "No graph was compiled through this pass yet. Call the compiled model itself: "
                "methods of it, such as generate(), run the model that was given."
            )
        lines = []
        for number in range(self.graphs):
            sites = [site for site in self.sites if site.graph == number]
            done = sum(site.rewritten for site in sites)
            lines.append(f"graph {number}: {done} of {len(sites)} all-reduces rewritten")
            lines += map(str, sites)
        return "\n".join(lines)


def _kind(site: Site) -> str:
    """What is put into the graph: whether the plan is asked now or at each call is the same."""
    return "fuse" if site.choice == "decide per call" else site.choice


def _left(site: Site, why: str) -> Site:
    return replace(site, choice="leave", why=why, fp8="") if site.rewritten else site


def _again(reduction: Reduction) -> Reduction:
    """The same all-reduce as its graph has it by now."""
    found = reduction_at(reduction.calls[-1])
    assert found is not None  # only its own rewrite erases it
    return found
