"""Where the pass meets Inductor. Everything taken from torch's private side is checked here.

Read in torch 2.11.0 and 2.13.0: ``post_grad_custom_pre_pass`` runs on the graph after AOTAutograd
and its decompositions, before Inductor's own rewrites; there the collectives are still
``_c10d_functional`` calls and nothing was reordered. 2.11 takes one pass, 2.13 also a list, so two
passes are chained here. A pass counts for the caches only if it is a ``CustomGraphPass``.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusewise.errors import UnavailableError
from fusewise.graph.fusion_pass import FusionPass

HOOK = "post_grad_custom_pre_pass"


class PassChain:
    """Passes run one after the other as one pass."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __deepcopy__(self, memo: dict[int, Any]) -> PassChain:
        """Itself: Inductor copies its options, and a communicator cannot be copied."""
        return self

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Runs each on ``graph``."""
        for one in self.passes:
            one(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """All uuids; None, which keeps a graph out of the cache, if one pass has none."""
        parts = tuple(one.uuid() if hasattr(one, "uuid") else None for one in self.passes)
        return None if None in parts else parts


def missing_feature() -> str | None:
    """What this torch lacks for the pass, or None."""
    try:
        from torch._inductor import config, custom_graph_pass
    except ImportError as error:
        return f"an Inductor that can be imported ({error})"
    base = getattr(custom_graph_pass, "CustomGraphPass", None)
    if not isinstance(base, ABCMeta) or not hasattr(base, "uuid"):
        return "torch._inductor.custom_graph_pass.CustomGraphPass with a uuid()"
    if list(inspect.signature(base.__call__).parameters) != ["self", "graph"]:
        return "CustomGraphPass.__call__(self, graph)"
    if HOOK not in config.get_config_copy():
        return f"torch._inductor.config.{HOOK}"
    return None if hasattr(ShapeEnv, "bound_sympy") else "ShapeEnv.bound_sympy"


def require() -> None:
    """Makes ``FusionPass`` a pass in Inductor's eyes.

    Raises:
        UnavailableError: this torch's Inductor is not one we know; says what is missing.
    """
    missing = missing_feature()
    if missing is not None:
        raise UnavailableError(
            "the fusion pass cannot be installed in this torch",
            expected=missing,
            got=f"torch {torch.__version__}",
            hint="Models still compile and run, unchanged; use torch 2.11 to 2.13 for the pass.",
        )
    from torch._inductor.custom_graph_pass import CustomGraphPass

    CustomGraphPass.register(FusionPass)
    CustomGraphPass.register(PassChain)


def options_with(fusion: FusionPass, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor options with the pass behind whatever pass was there before."""
    from torch._inductor import config

    before = options.get(HOOK, getattr(config, HOOK))
    if before is None or before is fusion:
        return options | {HOOK: fusion}
    earlier = before if isinstance(before, (list, tuple)) else [before]
    return options | {HOOK: PassChain([*earlier, fusion])}
