"""Profiles that decide an engine's cap: two ranks of H200s, with times as a test gives them."""

from __future__ import annotations

from typing import Any

from fusewise.engines.vllm.dispatch import VllmSettings
from fusewise.node import Fingerprint
from fusewise.profiles.schema import PathRecord, Profile, Provenance, Sample

MIB = 2**20
# Two H200s, measured. Times per size: fused, custom, nccl; None: not measured.
Times = tuple[float | None, float | None, float | None]
TP2 = VllmSettings("0.22", 90, 2, multicast=False, flashinfer_backend="trtllm")


def measured(columns: dict[int, dict[int, Times]], **mark: Any) -> Profile:
    names = ("flashinfer.one_shot", "custom + rms_norm", "nccl + rms_norm")
    samples: list[Sample] = []
    for hidden_size, column in columns.items():
        for size, times in column.items():
            one_shot_to = 2 * MIB if mark.get("world_size") == 4 else 32 * MIB
            fused = "flashinfer.two_shot" if size > one_shot_to else names[0]
            for name, time in zip((fused, *names[1:]), times, strict=True):
                if time is not None:
                    spread = tuple(time * (1 + 0.001 * i) for i in range(9))
                    samples.append(
                        Sample(
                            path=name,
                            num_tokens=size // (2 * hidden_size),
                            hidden_size=hidden_size,
                            times_us=spread,
                        )
                    )
    paths = [
        PathRecord(name=n, provider="test", fused="rms_norm" not in n)
        for n in (*names, "flashinfer.two_shot")
    ]
    facts = {"device_type": "cuda", "device": "NVIDIA H200", "sm": 90, "world_size": 2}
    return Profile(
        provenance=Provenance(origin="measured", source="test", created="2026-01-01", fusewise="0"),
        fingerprint=Fingerprint(**{**facts, "fabric": "nv18", **mark}),
        dtype="bfloat16",
        baseline="nccl + rms_norm",
        paths=tuple(paths),
        samples=tuple(samples),
    )


COLUMN: dict[int, Times] = {
    1 * MIB: (7.3, 12.0, 10.3),
    4 * MIB: (27.0, 30.0, 27.1),
    8 * MIB: (50.0, 39.0, 41.0),  # custom ends here: NCCL is the engine's alternative
    64 * MIB: (387.0, 300.0, 282.0),
}
