"""The starts of SGLang that ``sglang_simulation.py`` runs, and what they find on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
FULL = {"FUSEWISE_SGLANG": "full"}
TP2 = {"node_ranks": 2, "multicast": False, "hidden_size": 2048, "own_kernels": False}
HOME = "profile"  # replaced by a folder that holds one

SCENARIOS: dict[str, dict[str, Any]] = {
    "as it comes": {"traced": 0},
    "hidden 4096": {"hidden_size": 4096},
    "no multicast": {"multicast": False, "own_kernels": False},
    "measured": {**TP2, "environ": {"FUSEWISE_HOME": HOME}},
    "explicit": {"environ": {"FUSEWISE_CAP": "7M"}},
    "explicit, beyond": {"environ": {"FUSEWISE_CAP": "1G"}},
    "explicit, nothing fused": {"environ": {"FUSEWISE_CAP": "1K"}},
    "a draft first": {"draft": True},
    "full": {**TP2, "environ": FULL | {"FUSEWISE_HOME": HOME}},
    "full, profile on rank 0 only": {
        **TP2, "environ": FULL, "ranks": {"0": {"FUSEWISE_HOME": HOME}}
    },
    "full, profile gone": {**TP2, "environ": FULL, "ranks": {"1": {"FUSEWISE_HOME": HOME}}},
    "full, one cannot build": {
        **TP2, "environ": FULL | {"FUSEWISE_HOME": HOME}, "unbuilt": 1
    },
    "full, another plan": {**TP2, "environ": FULL | {"FUSEWISE_HOME": HOME}, "other_plan": 1},
    "full, two streams": {**TP2, "environ": FULL | {"FUSEWISE_HOME": HOME}, "pdmux": True},
    "off": {"environ": {"FUSEWISE_SGLANG": "off"}},
    "front end": {"worker": False},
    "no fusion": {"backend": None},
    "cutedsl": {"backend": "cutedsl", "sm": 100},
    "no workspace": {"no_workspace": True},
    "mnnvl": {"sm": 100},
    "unknown mode": {"ranks": {"1": {"FUSEWISE_SGLANG": "on"}}},
    "nonsense cap": {"ranks": {"1": {"FUSEWISE_CAP": "plenty"}}},
    "nonsense switch": {"environ": {"SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2": "2"}},
    "one rank off": {"ranks": {"1": {"FUSEWISE_SGLANG": "off"}}},
    "ranks differ": {"ranks": {"1": {"FUSEWISE_CAP": "1M"}}},
    "broken profile": {"environ": {"FUSEWISE_PROFILE": "/nowhere/profile.json"}},
    "old version": {"version": "0.5.20"},
    "new version": {"version": "0.6.1"},
    "another threshold": {"threshold": 512},
    "moved seam": {"moved": "no_such_thing"},
    "another unhooked it": {
        "unhooked": "sglang.srt.layers.flashinfer_comm_fusion.can_use_flashinfer_allreduce"
    },
    "other ranks": {"other_group": True},
    "mscclpp": {"mscclpp": True},
    "six ranks": {"node_ranks": 6},
}  # fmt: skip


def profile_text() -> str:
    """FlashInfer wins to 1 MiB, vLLM's custom kernel to 4 MiB, ours at 8 MiB."""
    times = {
        1 * MIB: (5.0, 12.0, 7.0),
        2 * MIB: (18.0, 14.0, 17.0),
        4 * MIB: (30.0, 20.0, 25.0),
        8 * MIB: (50.0, 39.0, 27.0),
    }
    paths = ("flashinfer.one_shot", "custom + rms_norm", "native.one_shot")
    samples = [
        {"path": path, "num_tokens": size // 4096, "hidden_size": 2048, "times_us": [time] * 3}
        for size, row in times.items()
        for path, time in zip(paths, row, strict=True)
    ]
    mark = {"device_type": "cuda", "device": "NVIDIA H200", "sm": 90, "world_size": 2,
            "fabric": "nv18"}  # fmt: skip
    return json.dumps({
        "schema_version": 1, "dtype": "bfloat16", "baseline": "custom + rms_norm",
        "provenance": {"origin": "measured", "source": "test", "created": "2026-01-01",
                       "fusewise": "0"},
        "fingerprint": mark, "samples": samples,
        "paths": [{"name": p, "provider": "t", "fused": "norm" not in p} for p in paths],
    })  # fmt: skip


def home_with_a_profile(folder: Path) -> str:
    from fusewise.node import Fingerprint
    from fusewise.profiles.schema import profile_file_name

    node = Fingerprint(device_type="cuda", device="NVIDIA H200", sm=90, world_size=2, fabric="nv18")
    (folder / "profiles").mkdir(parents=True, mode=0o700)
    file = folder / "profiles" / profile_file_name(node, "bfloat16")
    file.write_text(profile_text(), encoding="utf-8")
    return str(folder)


def entry_points(folder: Path) -> str:
    """The entry point as pyproject.toml declares it, whatever of us is installed here."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    declared = re.search(r'\[project\.entry-points\."(sglang[^"]*)"\]\n(.*)', text)
    assert declared is not None
    known = folder / "fusewise-0.1.0.dist-info"
    known.mkdir(parents=True)
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: fusewise\nVersion: 0.1.0\n")
    value = declared[2].replace('"', "")
    (known / "entry_points.txt").write_text(f"[{declared[1]}]\n{value}\n")
    return str(folder)
