"""A ``torch.compile`` backend without code generation: trace, decompose, rewrite, run node by node.

Shows on any machine, without a compiler and in seconds, what the pass makes of a model. Not for
speed: what Inductor would fuse runs here as single operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from fusewise.graph.fusion_pass import FusionPass

Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]


def interpreted_backend(
    fusion: FusionPass, seen: Callable[[torch.fx.Graph], None] | None = None
) -> Backend:
    """The backend; pass it as ``torch.compile(model, backend=...)``. Inference only.

    Args:
        fusion: the pass to apply.
        seen: called with each rewritten graph.
    """
    # Imported here: torch warns while it loads Inductor.
    from torch._inductor.compile_fx import compile_fx

    def rewrite(module: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        module.graph.eliminate_dead_code()
        fusion(module.graph)
        module.recompile()
        if seen is not None:
            seen(module.graph)
        run = module.forward

        def boxed(arguments: list[Any]) -> Any:
            taken = list(arguments)
            arguments.clear()  # the caller's references go, so that memory is given back in time
            return run(*taken)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        # Inductor up to the point where its post-grad passes would start.
        compiled: Any = compile_fx(module, inputs, inner_compile=rewrite)
        return cast("Callable[..., Any]", compiled)

    return backend
