"""For tests of the graph pass: profiles with a known boundary, operator counts, kernels shared."""

from __future__ import annotations

from typing import Any

import torch

from fusewise.node import probe
from fusewise.profiles.schema import PathRecord, Profile, Provenance, Sample
from fusewise.shape import parse_dtype

FUSED, UNFUSED = "shm.one_shot", "gloo + rms_norm"


def boundary_profile(
    last_fused: int, hidden_size: int, dtype: str = "float32", *, faster_all_reduce: bool = False
) -> Profile:
    """Two CPU ranks' profile in which fusing wins up to ``last_fused`` tokens and loses above.

    0 for ``last_fused`` makes fusing lose everywhere; ``faster_all_reduce`` lets the plain
    all-reduce through shared memory beat gloo's everywhere.
    """
    times = {last_fused: (10.0, 20.0), last_fused + 1: (20.0, 10.0)}
    samples = [
        Sample(path=path, num_tokens=tokens, hidden_size=hidden_size, times_us=(time_us,))
        for tokens, pair in times.items()
        if tokens
        for path, time_us in zip((FUSED, UNFUSED), pair, strict=True)
    ]
    if faster_all_reduce:
        samples += [
            Sample(
                op="all_reduce",
                path=path,
                num_tokens=64,
                hidden_size=hidden_size,
                times_us=(time_us,),
            )
            for path, time_us in (("shm.one_shot", 10.0), ("gloo", 20.0))
        ]
    return Profile(
        provenance=Provenance(
            origin="measured", source="made for a test", created="2026-01-01", fusewise="0"
        ),
        fingerprint=probe(2, device_type="cpu"),
        dtype=parse_dtype(dtype),
        baseline=UNFUSED,
        paths=(
            PathRecord(name=FUSED, provider="shm", fused=True),
            PathRecord(name=UNFUSED, provider="torch", fused=False),
        ),
        samples=tuple(samples),
    )


def count(graph: torch.fx.Graph, operator: str) -> int:
    """How often an operator such as ``"fusewise::all_reduce"`` is called in a graph."""
    targets = (n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    return sum(target.name().split(".")[0] == operator for target in targets)


def share_kernels(folder: str) -> None:
    """Ranks that call it compile each C++ kernel once between them, a second of a core each.

    What Inductor keeps of graphs stays where each rank has it: kernels are found by their source.
    """
    from torch._inductor import codecache

    own_path: Any = codecache.get_path

    def get_path(basename: str, extension: str, specified_dir: str = "") -> Any:
        shared = folder if extension.endswith("cpp") else ""
        return own_path(basename, extension, specified_dir or shared)

    codecache.get_path, codecache.get_lock_dir = get_path, lambda: folder
