"""What Dynamo makes of a function, as bytes: of two ranks that would trace the same, one does.

A graph of Dynamo's names no rank: a DTensor is one of its inputs, and so is the mesh; every rank
brings its own. Offsets become constants only behind it, in AOTAutograd, which each rank runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _CapturedError(Exception):
    """Ends a call at its graph."""


def captured(function: Callable[..., Any], **arguments: Any) -> bytes:
    """The one graph of ``function(**arguments)``, and where it finds each of its inputs."""
    from torch.fx._graph_pickler import GraphPickler, Options

    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)

        def stop(*inputs: Any) -> Any:
            raise _CapturedError

        return stop

    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # it is called once
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, options=unguarded, fullgraph=True)
    try:
        compiled(**arguments)
    except _CapturedError:
        (graph,) = graphs
    placeholders = graph.find_nodes(op="placeholder")
    sources: list[str] = [node._dynamo_source.name for node in placeholders]
    for node in graph.nodes:
        node.meta = {}  # values as this rank has them
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    return GraphPickler.dumps((module, sources), Options(ops_filter=None))


def run(capture: bytes, backend: Callable[..., Any], **arguments: Any) -> Any:
    """What ``torch.compile(function, backend=backend)(**arguments)`` returns, Dynamo left out."""
    from torch._subclasses import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler

    module, sources = GraphPickler.loads(capture, FakeTensorMode())  # type: ignore[misc]
    inputs = [eval(source, {"L": arguments}) for source in sources]
    (result,) = backend(module, inputs)(*inputs)
    return result
