"""Fetches SGLang's wheel with pip and keeps its Python sources, for the tests of the plugin.

    python -m tests.sglang_sources               # the release the plugin is run against
    python -m tests.sglang_sources --record      # writes tests/data/sglang_seams.json anew, of all
    python -m tests.sglang_sources --add 0.5.24  # fetches a new release, records it, prints what of
                                                 # its tables and seams differs from the newest's

``wheel_sources.py`` says how; this file says what is read in it.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fusewise.engines.on_disk import signature
from tests.wheel_sources import CACHE, Wheels, calls, differences, plain, table, write

WHEELS = Wheels("sglang", CACHE / "sglang-sources")
RECORD = Path(__file__).parent / "data" / "sglang_seams.json"
RUN_AGAINST = ("0.5.23",)
RELEASES = ("0.5.22", "0.5.23")

_COMMUNICATORS = "srt/distributed/device_communicators"
_FUSION = "srt/layers/flashinfer_comm_fusion.py"
_GATE = "srt/layers/layer_boundary/residual/add_norm.py"
# Our name in engines/sglang/tables.py → where SGLang keeps it.
TABLES = {
    "max_tokens": (_GATE, "FUSE_ALLREDUCE_MAX_BATCH_SIZE"),
    "legacy_max_bytes": (f"{_COMMUNICATORS}/custom_all_reduce.py", "_MAX_CAR_SIZE"),
    "legacy_world_sizes": (f"{_COMMUNICATORS}/custom_all_reduce.py", "_SUPPORTED_WORLD_SIZES"),
    "symm_mem": (f"{_COMMUNICATORS}/all_reduce_utils.py", "TORCH_SYMM_MEM_ALL_REDUCE_MAX_SIZES"),
    "multimem": (f"{_COMMUNICATORS}/torch_symm_mem.py", "_WORLD_SIZES_MULTIMEM"),
    "plugin_group": ("srt/plugins/__init__.py", "GENERAL_PLUGINS_GROUP"),
}
# What GroupCoordinator asks, by the words that ask it.
_QUESTIONS = {
    "is_symmetric_memory_enabled()": "nccl_symm",
    "_can_use_flashinfer_allreduce(input_)": "flashinfer",
    "ca_comm.should_custom_ar(input_)": "custom",
    "should_pcie_ipc_ar(": "flashinfer_pcie_ipc",
    "should_torch_symm_mem_allreduce(input_)": "symm_mem",
}
_SWITCHES = (
    "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2",
    "SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB",
    "SGLANG_FORCE_CUSTOM_ALL_REDUCE_V2_PULL_SIZE_KB",
    "SGLANG_FORCE_CUSTOM_ALL_REDUCE_V2_PUSH_SIZE_KB",
    "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE",
)
_OPTIONS = (
    "flashinfer_allreduce_fusion_backend", "enforce_disable_flashinfer_allreduce_fusion",
    "disable_custom_all_reduce", "enable_torch_symm_mem", "enable_symm_mem", "enable_mscclpp",
)  # fmt: skip


def facts(package: Path, seams: dict[str, str]) -> dict[str, Any]:
    """What the tests compare, read from the sources without importing SGLang.

    Args:
        package: a ``sglang`` folder.
        seams: seam's key → ``module:qualified.name``.
    """
    options = "sglang.srt.arg_groups.fields.exec_"
    return {
        "seams": {
            key: signature(package.parent, *place.split(":")) for key, place in seams.items()
        },
        "tables": {key: table(package / file, name) for key, (file, name) in TABLES.items()},
        "custom": _custom(package / _COMMUNICATORS / "configs" / "custom_all_reduce_v2.py"),
        "switches": _switches(package / "srt" / "environ.py"),
        "options": [name for name in _OPTIONS if _is_option(package, options, name)],
        "dispatch": _dispatch(package / "srt" / "distributed" / "parallel_state.py"),
        "gate": _gate(package / _GATE),
        "backend": {sm: _backend(package / _FUSION, sm) for sm in ("sm90", "sm100")},
        "fused_call": [c for c in calls(package / _FUSION, "dict") if "residual_in" in c],
        "pins": _pins(package.parent),
    }


def _function(file: Path, name: str) -> ast.FunctionDef:
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    return next(n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == name)


def _custom(file: Path) -> dict[str, Any]:
    """SGLang's own kernels: GPU → world size → context → ends in bytes."""
    module = runpy.run_path(str(file))
    return {
        gpu: {
            str(size): {at: plain(getattr(config, at)._asdict()) for at in ("graph", "eager")}
            for size, config in module[f"_{gpu}_configs"](132).items()
        }
        for gpu in ("sm90", "sm100", "sm107")
    }


def _switches(file: Path) -> dict[str, str | None]:
    """Each variable with its kind and default, as the class body has it."""
    text = file.read_text("utf-8")
    found = {n: re.search(rf"^    {n} = (\w+\(.*\))$", text, re.M) for n in _SWITCHES}
    return {name: match and match[1] for name, match in found.items()}


def _is_option(package: Path, module: str, name: str) -> bool:
    text = (package.parent / (module.replace(".", "/") + ".py")).read_text("utf-8")
    return re.search(rf"^    {name}: A\[", text, re.M) is not None


def _dispatch(file: Path) -> dict[str, list[str]]:
    found = {}
    for name in ("all_reduce", "_resolve_outplace_all_reduce_method"):
        body = ast.unparse(_function(file, name)).split("torch.compiler.is_compiling()")[-1]
        asked = re.findall("|".join(map(re.escape, _QUESTIONS)), body)
        found[name] = [_QUESTIONS[question] for question in asked]
    return found


def _gate(file: Path) -> list[str]:
    """The conditions of the gate, in their order."""
    (returned,) = _function(file, "flashinfer_ar_fusion_applies").body
    assert isinstance(returned, ast.Return) and isinstance(returned.value, ast.BoolOp)
    return [ast.unparse(condition) for condition in returned.value.values]


def _backend(file: Path, gpu: str) -> str:
    """What ``auto`` resolves to on one node: the function alone is run, on a stand-in platform."""
    platform = SimpleNamespace(is_sm90=gpu == "sm90", is_sm100=gpu == "sm100")
    scope: dict[str, Any] = {"get_platform": lambda: platform}
    exec(ast.unparse(_function(file, "_resolve_backend")), scope)
    return str(scope["_resolve_backend"]("auto"))


def _pins(folder: Path) -> dict[str, str]:
    """The versions a wheel insists on: torch's and FlashInfer's."""
    (metadata,) = folder.glob("sglang-*.dist-info/METADATA")
    names = r"^Requires-Dist: (torch|flashinfer_python)(?:\[\w+\])?==([^;\s]+)"
    return dict(re.findall(names, metadata.read_text("utf-8"), re.M))


def seam_places() -> dict[str, str]:
    """The plugin's seams: name → ``module:qualified.name``."""
    from fusewise.engines.sglang import seams

    every = (seams.REGISTRY_SEAM, *seams.HOOKED_SEAMS, *seams.READ_SEAMS)
    return {seam.name: f"{seam.module}:{seam.name}" for seam in every}


def add(version: str) -> int:
    """Records one more release and prints what somebody must put into ``tables.py``."""
    WHEELS.fetch(version)
    known = json.loads(RECORD.read_text("utf-8"))
    newest = list(known)[-1]
    found = facts(WHEELS.folder / version / "sglang", seam_places())
    changed = differences(known[newest], found)
    write(RECORD, {**known, version: found})
    print(f"SGLang {version} against {newest}:", *(changed or ["nothing differs"]), sep="\n  ")
    moved = [line for line in changed if line.startswith(("seams", "fused_call", "gate"))]
    return 1 if moved else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the record anew")
    parser.add_argument("--add", metavar="VERSION", help="record a new release, print its diff")
    asked = parser.parse_args()
    if asked.add:
        return add(asked.add)
    WHEELS.fetch_all(*(RELEASES if asked.record else RUN_AGAINST))
    if asked.record:
        here = [version for version in RELEASES if WHEELS.unpacked(version)]
        write(RECORD, {v: facts(WHEELS.folder / v / "sglang", seam_places()) for v in here})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
