"""Fetches vLLM wheels with pip and keeps their Python sources, for the tests of the plugin.

    python -m tests.vllm_sources            # the two versions the plugin is run against
    python -m tests.vllm_sources --all      # every release whose seams are recorded
    python -m tests.vllm_sources --record   # writes tests/data/vllm_seams.json anew from --all
    python -m tests.vllm_sources --add 0.34.0   # fetches a new release, records it, prints what
                                            # of its tables and seams differs from the newest's

``wheel_sources.py`` says how; this file says what is read in them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from fusewise.engines.on_disk import signature
from tests.wheel_sources import CACHE, Wheels, calls, differences, table, write

WHEELS = Wheels("vllm", CACHE / "vllm-sources")
RECORD = Path(__file__).parent / "data" / "vllm_seams.json"
RUN_AGAINST = ("0.22.1", "0.33.0")
RELEASES = (
    "0.20.0", "0.21.0", "0.22.1", "0.23.0", "0.24.0", "0.25.0", "0.26.0",
    "0.27.0", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0",
)  # fmt: skip

_COMMUNICATORS = "distributed/device_communicators"
_HAND_FUSED = "model_executor/layers/fused_allreduce_gemma_rms_norm.py"
_FUSION = "compilation/passes/fusion/allreduce_rms_fusion.py"
# Our name in engines/vllm/tables.py → where vLLM keeps it.
TABLES = {
    "fusion": (_FUSION, "FI_ALLREDUCE_FUSION_MAX_SIZE_MB"),
    "one_shot": (_FUSION, "_FI_ALLREDUCE_ONE_SHOT_MAX_SIZES_MB"),
    "custom": (f"{_COMMUNICATORS}/all_reduce_utils.py", "CUSTOM_ALL_REDUCE_MAX_SIZES"),
    "symm_mem": (f"{_COMMUNICATORS}/all_reduce_utils.py", "SYMM_MEM_ALL_REDUCE_MAX_SIZES"),
    "nccl_symm": (f"{_COMMUNICATORS}/all_reduce_utils.py", "NCCL_SYMM_MEM_ALL_REDUCE_CONFIG"),
    "mnnvl": (f"{_COMMUNICATORS}/all_reduce_utils.py", "FI_MNNVL_ALLREDUCE_MAX_SIZE_MB"),
    "multimem": (f"{_COMMUNICATORS}/symm_mem.py", "_WORLD_SIZES_MULTIMEM"),
    "flashinfer_default": ("envs.py", "VLLM_ALLREDUCE_USE_FLASHINFER"),
}
# What CudaCommunicator.all_reduce asks, by the call that asks it.
_QUESTIONS = {
    "should_nccl_symm_mem_allreduce": "nccl_symm",
    "should_use_fi_ar": "flashinfer",
    "ca_comm.should_custom_ar": "custom",
    "should_use_symm_mem": "symm_mem",
}


def facts(package: Path, seams: dict[str, str]) -> dict[str, Any]:
    """What the tests compare, read from the sources without importing them.

    Args:
        package: a ``vllm`` folder.
        seams: seam's key → ``module:qualified.name``.
    """
    return {
        "seams": {
            key: signature(package.parent, *place.split(":")) for key, place in seams.items()
        },
        "tables": {key: table(package / file, name) for key, (file, name) in TABLES.items()},
        "dispatch": _dispatch(package / _COMMUNICATORS / "cuda_communicator.py"),
        "prefers_mnnvl": "allow_trtllm_fallback"
        in (package / _COMMUNICATORS / "flashinfer_all_reduce.py").read_text("utf-8"),
        "fused_call": calls(package / _FUSION, "flashinfer_comm.allreduce_fusion"),
        "invariant_is_plain": "not envs.VLLM_BATCH_INVARIANT"
        in (package / _COMMUNICATORS / "cuda_communicator.py").read_text("utf-8").split("def ")[1],
        "hand_fused": (package / _HAND_FUSED).exists(),
        "has_pcie_ipc": "FLASHINFER_PCIE_IPC" in (package / "envs.py").read_text("utf-8"),
        "copies_to_ray": "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
        in (package / "envs.py").read_text("utf-8"),
        "pins": _pins(package.parent),
    }


def _pins(folder: Path) -> dict[str, str]:
    """The versions a wheel insists on: torch's and FlashInfer's."""
    (metadata,) = folder.glob("vllm-*.dist-info/METADATA")
    found = re.findall(
        r"^Requires-Dist: (torch|flashinfer-python)==([^;\s]+)", metadata.read_text("utf-8"), re.M
    )
    return dict(found)


def add(version: str) -> int:
    """Records one more release and prints what somebody must put into ``tables.py``."""
    WHEELS.fetch(version)
    known = json.loads(RECORD.read_text("utf-8"))
    newest = list(known)[-1]
    found = facts(WHEELS.folder / version / "vllm", seam_places())
    changed = differences(known[newest], found)
    write(RECORD, {**known, version: found})
    minor = ".".join(version.split(".")[:2])
    print(f"vLLM {version} against {newest}:", *(changed or ["nothing differs"]), sep="\n  ")
    print(f'tables.py: "{minor}": replace(TABLES[...], read_in="{version}", ...what differs above)')
    moved = [line for line in changed if line.startswith(("seams", "fused_call"))]
    return 1 if moved else 0


def _dispatch(file: Path) -> list[str]:
    text = file.read_text("utf-8")
    body = re.search(r"\n    def all_reduce\(.*?(?=\n    def )", text, re.DOTALL)
    assert body is not None, file
    asked = re.findall("|".join(map(re.escape, _QUESTIONS)), body[0])
    return [_QUESTIONS[question] for question in asked]


def seam_places() -> dict[str, str]:
    """The plugin's seams: name → ``module:qualified.name``."""
    from fusewise.engines.vllm import seams as vllm_seams

    seams = (
        *vllm_seams.CONFIG_SEAMS,
        *vllm_seams.WORKER_SEAMS,
        vllm_seams.TABLE_SEAM,
        vllm_seams.FUSED_SEAM,
    )
    return {seam.name: f"{seam.module}:{seam.name}" for seam in seams}


def record() -> dict[str, Any]:
    """The facts of every release, all of which must be unpacked."""
    return {
        v: facts(WHEELS.folder / v / "vllm", seam_places()) for v in RELEASES if WHEELS.unpacked(v)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every release with recorded seams")
    parser.add_argument("--record", action="store_true", help="write the record of all anew")
    parser.add_argument("--add", metavar="VERSION", help="record a new release, print its diff")
    asked = parser.parse_args()
    if asked.add:
        return add(asked.add)
    WHEELS.fetch_all(*(RELEASES if asked.all or asked.record else RUN_AGAINST))
    if asked.record:
        write(RECORD, record())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
