"""``doctor``: what this node is, which backends can run, which not, why, and what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, get_args

from fusewise.commands.options import FormatOption, TpOption, bordered, this_node, write
from fusewise.errors import FusewiseError
from fusewise.node import Fingerprint
from fusewise.profiles import store
from fusewise.report.table import Column, Section
from fusewise.shape import DType, format_size

_SWITCHES = (
    "NCCL_NVLS_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
    "FUSEWISE_HOME",
    "FUSEWISE_PROFILE",
    "FUSEWISE_STRICT",
    "FUSEWISE_CAP",
    "FUSEWISE_VLLM",
)
_BACKENDS = (
    Column("backend", "backend"),
    Column("provider", "provider"),
    Column("available", "available"),
    Column("reason", "why not, and what to do"),
)
_FACTS = (Column("fact", "fact"), Column("value", "value"))


@bordered
def doctor(tp: TpOption = None, fmt: FormatOption = "table") -> None:
    """This node, its switches, its profiles, and every backend: available, or why not.

    Cheap: nothing is built and no GPU memory is touched. `fusewise tune` tries for real.
    """
    node = this_node(tp)
    write(
        [
            Section("node", _FACTS, _node(node), "Node"),
            Section("backends", _BACKENDS, _backends(node), "Backends"),
            Section("profiles", _FACTS, _profiles(node), "Profiles"),
        ],
        fmt,
    )


def _node(node: Fingerprint) -> list[dict[str, Any]]:
    facts = node.model_dump(exclude_none=True)
    facts |= {name: os.environ[name] for name in _SWITCHES if name in os.environ}
    shm = Path("/dev/shm")
    if shm.is_dir():
        facts["shared memory free"] = format_size(max(1, shutil.disk_usage(shm).free))
    return [{"fact": key, "value": value} for key, value in facts.items()]


def _backends(node: Fingerprint) -> list[dict[str, Any]]:
    from fusewise.backends.registry import all_ids, backend_class

    try:
        import torch  # noqa: F401  every backend's file needs it
    except (ImportError, OSError) as error:
        why = f"torch cannot be imported ({error}). Run `pip install torch`."
        ill = {"provider": None, "available": False, "reason": why}
        return [{"backend": backend_id, **ill} for backend_id in all_ids()]
    rows = []
    for backend_id in all_ids():
        kind = backend_class(backend_id)
        reason = kind.available(node)
        rows.append(
            {
                "backend": backend_id,
                "provider": kind.provider,
                "available": reason is None,
                "reason": reason,
            }
        )
    return rows


def _profiles(node: Fingerprint) -> list[dict[str, Any]]:
    rows = []
    for dtype in get_args(DType):
        try:
            found = store.find_profile(node, dtype)
        except FusewiseError as error:  # the doctor names what is ill, and goes on
            rows.append({"fact": dtype, "value": str(error)})
            continue
        rows.append({"fact": dtype, "value": f"{found.where} ({found.level})"})
        rows += [{"fact": f"{dtype} note", "value": note} for note in found.notes]
    rows.append({"fact": "user's profiles", "value": str(store.user_dir())})
    rows.append({"fact": "site's profiles", "value": str(store.site_dir())})
    rows.append({"fact": "packaged profiles", "value": ", ".join(store.packaged_names())})
    return rows
