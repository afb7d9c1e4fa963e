"""Small profiles for tests, built from a table of medians."""

from __future__ import annotations

import random
from collections.abc import Mapping

from fusewise.node import Fingerprint
from fusewise.operation import Op
from fusewise.profiles.schema import Numerics, PathRecord, Profile, Provenance, Sample

FUSED, UNFUSED = "flashinfer.one_shot", "nccl + rms_norm"
EXACT = Numerics(accumulation="float32", order="rank", rounds_sum=False)
NODE = Fingerprint(
    device_type="cuda", device="NVIDIA H200", sm=90, world_size=2, fabric="nv18",
    driver="580.1", cuda="13.0", nccl="2.28.9", torch="2.11.0", flashinfer="0.6.11",
)  # fmt: skip


def jittered(median_us: float, seed: int, rounds: int = 21, spread: float = 0.01) -> list[float]:
    """Times around a median, the same for a seed."""
    rng = random.Random(seed)
    return [round(median_us * (1 + spread * rng.uniform(-1, 1)), 4) for _ in range(rounds)]


def profile_of(
    medians: Mapping[int, Mapping[str, float]],
    *,
    hidden_size: int = 2048,
    node: Fingerprint = NODE,
    rounds: int = 21,
    spread: float = 0.01,
    baseline: str = UNFUSED,
) -> Profile:
    """A measured profile from num_tokens → path → median µs."""
    names = dict.fromkeys(name for row in medians.values() for name in row)
    return Profile(
        provenance=Provenance(
            origin="measured", source="a test", created="2026-01-01", fusewise="0.1.0"
        ),
        fingerprint=node,
        dtype="bfloat16",
        baseline=baseline,
        paths=tuple(
            PathRecord(name=n, provider=n.split(".")[0], fused=" + " not in n, numerics=EXACT)
            for n in names
        ),
        samples=tuple(
            Sample(
                path=name,
                num_tokens=tokens,
                hidden_size=hidden_size,
                times_us=tuple(jittered(time, tokens * 31 + i, rounds, spread)),
            )
            for tokens, row in medians.items()
            for i, (name, time) in enumerate(row.items())
        ),
    )


def sample(
    path: str,
    kib: int,
    time_us: float,
    hidden_size: int = 2048,
    rounds: int = 9,
    op: Op = "all_reduce_rms_norm",
) -> Sample:
    """One path at ``kib`` KiB of bfloat16, every round alike."""
    tokens = kib * 1024 // (2 * hidden_size)
    return Sample(
        op=op, path=path, num_tokens=tokens, hidden_size=hidden_size, times_us=(time_us,) * rounds
    )
