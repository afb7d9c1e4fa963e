"""Fetches vLLM wheels with pip and keeps their Python sources, for the tests of the plugin.

    python tests/vllm_sources.py            # the two versions the plugin is run against
    python tests/vllm_sources.py --all      # every release whose seams are recorded
    python tests/vllm_sources.py --record   # writes tests/data/vllm_seams.json anew from --all
    python tests/vllm_sources.py --add 0.34.0   # fetches a new release, records it, prints what
                                            # of its tables and seams differs from the newest's

A wheel is some 300 MB, of which the sources kept under .cache/vllm-sources are a tenth; it is
removed once unpacked. Released wheels do not change, so what was unpacked once stays.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from fusewise.engines.vllm.on_disk import definition, signature

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "vllm-sources"
RECORD = ROOT / "tests" / "data" / "vllm_seams.json"
RUN_AGAINST = ("0.22.1", "0.33.0")
RELEASES = (
    "0.20.0", "0.21.0", "0.22.1", "0.23.0", "0.24.0", "0.25.0", "0.26.0",
    "0.27.0", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0",
)  # fmt: skip
DOWNLOAD_TIMEOUT_S = 600

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


def unpacked(version: str) -> Path | None:
    """The folder that holds a version's ``vllm`` package, or None when it was not fetched."""
    folder = FOLDER / version
    return folder if (folder / ".complete").exists() else None


def fetch(version: str) -> None:
    """Downloads one wheel with pip and unpacks its Python files."""
    if unpacked(version):
        return
    folder = FOLDER / version
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--only-binary", ":all:"]
        command += ["--retries", "1", "--dest", scratch, f"vllm=={version}"]
        subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [n for n in archive.namelist() if n.endswith((".py", "dist-info/METADATA"))]
            archive.extractall(folder, wanted)
    (folder / ".complete").touch()


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
        "tables": {key: _table(package / file, name) for key, (file, name) in TABLES.items()},
        "dispatch": _dispatch(package / _COMMUNICATORS / "cuda_communicator.py"),
        "prefers_mnnvl": "allow_trtllm_fallback"
        in (package / _COMMUNICATORS / "flashinfer_all_reduce.py").read_text("utf-8"),
        "fused_call": _fused_call(package / _FUSION),
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


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """One line per value that differs between two releases' facts."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        inner = (differences(old.get(k), new.get(k), f"{place}.{k}".lstrip(".")) for k in keys)
        return [line for lines in inner for line in lines]
    return [] if old == new else [f"{place}: {old} -> {new}"]


def add(version: str) -> int:
    """Records one more release and prints what somebody must put into ``tables.py``."""
    fetch(version)
    known = json.loads(RECORD.read_text("utf-8"))
    newest = list(known)[-1]
    found = facts(FOLDER / version / "vllm", seam_places())
    changed = differences(known[newest], found)
    write({**known, version: found})
    minor = ".".join(version.split(".")[:2])
    print(f"vLLM {version} against {newest}:", *(changed or ["nothing differs"]), sep="\n  ")
    print(f'tables.py: "{minor}": replace(TABLES[...], read_in="{version}", ...what differs above)')
    moved = [line for line in changed if line.startswith(("seams", "fused_call"))]
    return 1 if moved else 0


def write(record: dict[str, Any]) -> None:
    """The record's file, a release a line."""
    lines = [f' "{version}": {json.dumps(entry)}' for version, entry in record.items()]
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _table(file: Path, name: str) -> Any:
    """A table's value with its keys as text, as JSON keeps them; None when absent."""
    tree = ast.parse(file.read_text("utf-8"))
    node: Any = definition(tree, name)
    if node is None:
        return None
    sizes = {"KiB": 2**10, "MiB": 2**20}
    return _plain(eval(compile(ast.Expression(node.value), str(file), "eval"), sizes))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _dispatch(file: Path) -> list[str]:
    text = file.read_text("utf-8")
    body = re.search(r"\n    def all_reduce\(.*?(?=\n    def )", text, re.DOTALL)
    assert body is not None, file
    asked = re.findall("|".join(map(re.escape, _QUESTIONS)), body[0])
    return [_QUESTIONS[question] for question in asked]


def _fused_call(file: Path) -> list[list[str]]:
    """Keyword names of every ``flashinfer_comm.allreduce_fusion(...)``, positional ones as *."""
    calls = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)]
    fused = [c for c in calls if ast.unparse(c.func) == "flashinfer_comm.allreduce_fusion"]
    return [["*"] * len(c.args) + [str(k.arg) for k in c.keywords] for c in fused]


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
    return {v: facts(FOLDER / v / "vllm", seam_places()) for v in RELEASES if unpacked(v)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every release with recorded seams")
    parser.add_argument("--record", action="store_true", help="write the record of all anew")
    parser.add_argument("--add", metavar="VERSION", help="record a new release, print its diff")
    asked = parser.parse_args()
    if asked.add:
        return add(asked.add)
    for version in RELEASES if asked.all or asked.record else RUN_AGAINST:
        try:
            fetch(version)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"vLLM {version} could not be fetched, its tests will be skipped: {error}")
    if asked.record:
        write(record())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
