"""What each rank compiles in ``multirank/test_compile_faults.py``, and what came of it."""

from __future__ import annotations

import gc
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc

import fusewise
from fusewise.errors import InputError
from fusewise.graph.interpreted import interpreted_backend
from tests.compiled import boundary_profile, share_kernels

H, TOKENS = 64, 8
HOOK = "post_grad_custom_pre_pass"


class Tail(torch.nn.Module):
    """The end of a layer as model code has it: eps is an attribute."""

    def __init__(self, eps: float, keep: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((H,), 0.5))
        self.eps = eps
        self.keep = keep

    def forward(self, x: Any, r: Any) -> Any:
        y = fc.all_reduce(x, "sum", dist.group.WORLD)
        s = y + r
        h = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h, s, y) if self.keep else (self.weight * h, s)


class Log(logging.Handler):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def _inputs(rank: int) -> tuple[Any, Any]:
    x = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(rank))
    return x, torch.ones(TOKENS, H)


def _ran(compiled: Any, model: Any, rank: int) -> float:
    """The largest difference to eager."""
    inputs = _inputs(rank)
    got, expected = compiled(*inputs), model(*inputs)
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))


def _choices(fusion: Any) -> list[str]:
    return [site.choice for site in fusion.sites]


def _eps(rank: int, communicator: Any) -> dict[str, Any]:
    """eps by attribute, sizes dynamic, a second model of the same code with another eps."""
    results: dict[str, Any] = {}
    ways = {
        "compile": lambda model, fusion: fusewise.compile(model, fusion=fusion, dynamic=True),
        "own": lambda model, fusion: torch.compile(model, options={HOOK: fusion}, dynamic=True),
    }
    for name, way in ways.items():
        torch._dynamo.reset()
        for eps in (1e-6, 0.5):
            fusion = fusewise.fusion_pass(communicator=communicator)
            difference = _ran(way(Tail(eps), fusion), Tail(eps), rank)
            results[f"{name}, eps {eps:g}"] = (_choices(fusion), difference)
    model = Tail(1e-6)
    fusion = fusewise.fusion_pass(communicator=communicator)
    torch._dynamo.reset()
    compiled = fusewise.compile(model, fusion=fusion, dynamic=True)
    worst = _ran(compiled, model, rank)
    model.eps = 0.25
    worst = max(worst, _ran(compiled, model, rank))
    results["changed"] = (_choices(fusion), worst)
    return results


def _two_graphs(rank: int, communicator: Any, log: Log) -> dict[str, Any]:
    """Ranks that would rewrite differently, with and without a cached graph on one of them.

    Had one waited for the other, the wait's end would be an error.
    """
    results: dict[str, Any] = {}
    for name, keeps in {
        "one rank reads more": rank == 1,
        "all alike": False,
        "a cache on one rank": False,
        "a cache and another graph": rank == 1,
    }.items():
        cached = rank == 0 or not name.startswith("a cache")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        log.taken()
        fusion = fusewise.fusion_pass(communicator=communicator)
        model = Tail(1e-6, keeps)
        compiled = fusewise.compile(model, fusion=fusion, options={"fx_graph_cache": cached})
        difference = _ran(compiled, model, rank)
        results[name] = {
            "choices": _choices(fusion),
            "difference": difference,
            "hits": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"],
            "warnings": [line for line in log.taken() if line.startswith("WARNING")],
            "why": [site.why for site in fusion.sites],
        }
    return results


class Broken(Tail):
    """Breaks its graph behind the first of three all-reduces where told to."""

    def forward(self, x: Any, r: Any) -> Any:
        norm, s = Tail.forward(self, x, r)
        if self.broken:
            torch._dynamo.graph_break()
        norm, s = Tail.forward(self, norm, s)
        return norm, fc.all_reduce(s, "sum", dist.group.WORLD)


def _one_rank_breaks(rank: int, communicator: Any) -> dict[str, Any]:
    """One graph of three all-reduces on one rank, two graphs on the other."""
    torch._dynamo.reset()
    fusion = fusewise.fusion_pass(communicator=communicator)
    model = Broken(1e-6)
    model.broken = rank == 1
    compiled = torch.compile(model, backend=interpreted_backend(fusion))
    difference = _ran(compiled, model, rank)
    return {"choices": _choices(fusion), "graphs": fusion.graphs, "difference": difference}


def _communicators(rank: int) -> dict[str, float]:
    """A compiled model between communicators that come and go on its group."""
    results: dict[str, float] = {}
    with torch.no_grad():
        first = Tail(1e-6)
        compiled = fusewise.compile(first, profile=boundary_profile(16, H))
        results["alone"] = _ran(compiled, first, rank)
        with fusewise.Communicator(profile=boundary_profile(0, H)):
            results["beside another"] = _ran(compiled, first, rank)
        results["the other closed"] = _ran(compiled, first, rank)
        second = fusewise.compile(Tail(1e-5), profile=boundary_profile(16, H))
        results["beside a second model"] = _ran(second, Tail(1e-5), rank)
        del second
        torch._dynamo.reset()
        gc.collect()
        results["the second dropped"] = _ran(compiled, first, rank)
    return results


def _gradients(rank: int, communicator: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    x, r = _inputs(rank)
    x.requires_grad_()
    for name, call in {
        "all_reduce": lambda: torch.ops.fusewise.all_reduce(x, communicator.handle),
        "all_reduce_rms_norm": lambda: torch.ops.fusewise.all_reduce_rms_norm(
            x, r, torch.ones(H), 1e-6, 0.0, communicator.handle
        ),
        "traced": lambda: torch.compile(communicator.all_reduce, backend="aot_eager")(x),
    }.items():
        try:
            call()
        except (InputError, torch._dynamo.exc.TorchRuntimeError) as refused:
            results[name] = str(refused)
    fusion = fusewise.fusion_pass(communicator=communicator)
    model = Tail(1e-6)
    torch._dynamo.reset()
    fusewise.compile(model, fusion=fusion)(x, r)[0].sum().backward()
    got, x.grad = x.grad, None
    model(x, r)[0].sum().backward()
    assert got is not None and x.grad is not None
    results["training"] = (_choices(fusion), float((got - x.grad).abs().max()))
    return results


def _said(rank: int, communicator: Any, log: Log) -> dict[str, Any]:
    """What the log says about models that get nothing, and about those that get something."""
    results: dict[str, Any] = {}
    log.taken()
    for name, function in {
        "rewritten": Tail(1e-6),
        "nothing": lambda x, r: (fc.all_reduce(x, "sum", dist.group.WORLD).relu(), r),
    }.items():
        torch._dynamo.reset()
        _ran(fusewise.compile(function, fusion=_pass(communicator)), function, rank)
        results[name] = log.taken()
    unused = fusewise.compile(Tail(1e-6), fusion=_pass(communicator))
    log.taken()
    del unused
    gc.collect()
    results["unused"] = log.taken()
    return results


def _pass(communicator: Any) -> Any:
    return fusewise.fusion_pass(communicator=communicator)


def _traced(rank: int, communicator: Any) -> dict[str, float]:
    """``Communicator``'s own methods under torch.compile and torch.export."""

    class Own(torch.nn.Module):
        def forward(self, x: Any, r: Any) -> Any:
            out, total = communicator.all_reduce_rms_norm(x, r, torch.ones(H), 1e-6)
            return out, communicator.all_reduce(total)

    torch._dynamo.reset()
    model = Own()
    results = {"compiled": _ran(torch.compile(model, fullgraph=True), model, rank)}
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, _inputs(rank)), buffer)
    buffer.seek(0)
    results["exported"] = _ran(torch.export.load(buffer).module(), model, rank)
    return results


def everything(rank: int, cache: str) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / str(rank))
    share_kernels(cache)
    log = Log()
    logging.getLogger("fusewise").addHandler(log)
    logging.getLogger("fusewise").setLevel(logging.INFO)
    results: dict[str, Any] = {"communicators": _communicators(rank)}
    torch._dynamo.reset()
    gc.collect()
    with fusewise.Communicator(profile=boundary_profile(16, H), timeout_s=60) as communicator:
        with torch.no_grad():
            results["eps"] = _eps(rank, communicator)
            results["graphs"] = _two_graphs(rank, communicator, log)
            results["broken"] = _one_rank_breaks(rank, communicator)
            results["said"] = _said(rank, communicator, log)
            results["traced"] = _traced(rank, communicator)
        results["gradients"] = _gradients(rank, communicator)
    return results
