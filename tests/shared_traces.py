"""What Dynamo makes of a function, as bytes: of two ranks that would trace the same, one does.

A graph of Dynamo's names no rank: a DTensor is one of its inputs, and so is the mesh; every rank
brings its own. Offsets become constants only behind it, in AOTAutograd, which each rank runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _CapturedError(Exception):
    """Ends a compilation at its graph: guards and bytecode are for calls, and there is none."""


def captured(function: Callable[..., Any], **arguments: Any) -> bytes:
    """The one graph of ``function(**arguments)``, and where it finds each of its inputs."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch.fx._graph_pickler import GraphPickler, Options

    found: list[bytes] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graph = module.graph
        sources: list[str] = [
            node._dynamo_source.name for node in graph.find_nodes(op="placeholder")
        ]
        for node in graph.nodes:
            node.meta = {}  # values as this rank has them
        bare = torch.fx.GraphModule(torch.nn.Module(), graph)
        found.append(GraphPickler.dumps((bare, sources), Options(ops_filter=None)))
        raise _CapturedError

    torch._dynamo.reset()
    try:
        torch.compile(function, backend=backend, fullgraph=True)(**arguments)
    except BackendCompilerFailed as failed:
        if not isinstance(failed.inner_exception, _CapturedError):
            raise
    (capture,) = found
    return capture


def run(capture: bytes, backend: Callable[..., Any], **arguments: Any) -> Any:
    """What ``torch.compile(function, backend=backend)(**arguments)`` returns, Dynamo left out."""
    from torch._subclasses import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler

    module, sources = GraphPickler.loads(capture, FakeTensorMode())  # type: ignore[misc]
    inputs = [eval(source, {"L": arguments}) for source in sources]
    (result,) = backend(module, inputs)(*inputs)
    return result
