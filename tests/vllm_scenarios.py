"""The starts of vLLM that ``vllm_simulation.py`` runs, and the profiles they find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIB = 2**20

NCCL_ON = {"environ": {"VLLM_USE_NCCL_SYMM_MEM": "1"}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "seed": {},
    "seed, hidden 4096": {"hidden_size": 4096},
    "seed, hidden 7168": {"hidden_size": 7168},
    "as it comes": {"environ": {"VLLM_FLASHINFER_ALLREDUCE_BACKEND": "auto"}},
    "as it comes, nccl": {"environ": {"VLLM_FLASHINFER_ALLREDUCE_BACKEND": "auto",
                                      "VLLM_USE_NCCL_SYMM_MEM": "1"}},
    "no multicast": {"multicast": False},
    "nccl symmetric memory": NCCL_ON,
    "nccl symmetric memory, no multicast": {**NCCL_ON, "multicast": False},
    "user's cap": {"field_mb": 0.375},
    "off": {"environ": {"FUSEWISE_VLLM": "off"}},
    "unknown mode": {"environ": {"FUSEWISE_VLLM": "on"}},
    "loaded twice": {"loads": 2},
    "tp 1": {"world_size": 1},
    "tp 2": {"world_size": 2},
    "tp 2, losing": {"world_size": 2, "multicast": False, "profile": "losing"},
    "tp 2, never winning": {"world_size": 2, "multicast": False, "profile": "never"},
    "full": {"world_size": 2, "multicast": False, "profile": "native",
             "environ": {"FUSEWISE_VLLM": "full"}},
    "full without native": {"environ": {"FUSEWISE_VLLM": "full"}},
    "no flashinfer": {"flashinfer": False},
    "a version before all that were read": {"version": "0.19.1"},
    "a version after all that were read": {"version": "0.99.0"},
    "-O0": {"fuse": False},
    "-O0, plain FlashInfer on": {"fuse": False, "environ": {"VLLM_ALLREDUCE_USE_FLASHINFER": "1"}},
    "-O0, no flashinfer": {"fuse": False, "flashinfer": False},
    "batch invariant": {"environ": {"VLLM_BATCH_INVARIANT": "1"}},
    "NCCL without multicast": {"multicast": False, "torch_multicast": True},
    "external launcher": {"backend": "external_launcher"},
    "rebuilt": {"rebuilt": True},
    "rebuilt after a fault": {"rebuilt": True, "probe_fails": True},
    "nonsense": {"environ": {"VLLM_USE_NCCL_SYMM_MEM": "maybe"}},
    "no size": {"environ": {"FUSEWISE_CAP": "lots"}},
    "changed table": {"live_cap_mb": 0.75},
    "moved seam": {"moved": "no_such_thing"},
    "probe fails": {"probe_fails": True},
    "two nodes": {"nodes": 2},
    "broken profile": {"profile": "broken"},
    "profile named but missing": {"environ": {"FUSEWISE_PROFILE": "/nowhere/profile.json"}},
    "another GPU": {"sm": 100},
    "no fusion on it": {"sm": 80},
}  # fmt: skip


def _profile_text(kind: str) -> str:
    """A stored profile of the simulated two-rank node."""
    if kind == "broken":
        return '{"schema_version": 1, "provenance": {'
    fused = {"losing": 50.0, "never": 50.0, "native": 50.0}[kind]
    sizes = [4 * MIB, 8 * MIB, 64 * MIB]
    samples = []
    for size in sizes:
        tokens = size // 4096
        wins = kind != "never" and size == 4 * MIB
        flash = "flashinfer.one_shot" if size <= 32 * MIB else "flashinfer.two_shot"
        own = "custom + rms_norm" if size < 8 * MIB else "nccl + rms_norm"
        times = {flash: 30.0 if wins else fused, own: 40.0}
        if kind == "native":
            times["native.one_shot"] = 20.0 if size <= 8 * MIB else 45.0
        samples += [
            {"path": p, "num_tokens": tokens, "hidden_size": 2048, "times_us": [t] * 3}
            for p, t in times.items()
        ]
    names = sorted({str(s["path"]) for s in samples})
    paths = [{"name": n, "provider": "test", "fused": "rms_norm" not in n} for n in names]
    mark = {"device_type": "cuda", "device": "NVIDIA H200", "sm": 90, "world_size": 2,
            "fabric": "nv18", "flashinfer": "0.6.11.post2"}  # fmt: skip
    head = {"origin": "measured", "source": "test", "created": "2026-01-01", "fusewise": "0"}
    return json.dumps({
        "schema_version": 1, "provenance": head, "fingerprint": mark, "dtype": "bfloat16",
        "baseline": "nccl + rms_norm", "paths": paths, "samples": samples,
    })  # fmt: skip


def homes_in(folder: Path) -> dict[str, str]:
    """kind → a FUSEWISE_HOME that holds that profile under the node's name."""
    from fusewise.node import Fingerprint
    from fusewise.profiles.schema import profile_file_name

    homes = {}
    for kind, world_size, multicast in [
        ("losing", 2, False), ("never", 2, False), ("native", 2, False), ("broken", 8, True),
    ]:  # fmt: skip
        node = Fingerprint(
            device_type="cuda", device="NVIDIA H200", sm=90, world_size=world_size,
            fabric="nv18", multicast=multicast,
        )  # fmt: skip
        home = folder / kind / "profiles"
        home.mkdir(parents=True, mode=0o700)
        name = profile_file_name(node, "bfloat16")
        (home / name).write_text(_profile_text(kind), encoding="utf-8")
        homes[kind] = str(home.parent)
    return homes
