"""``doctor``: what this node is, which backends can run, which not, why, and what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, get_args

from fusewise.commands.options import FormatOption, TpOption, bordered, this_node
from fusewise.commands.output import write
from fusewise.engines.plugin import explicit_cap, mode
from fusewise.errors import FusewiseError
from fusewise.node import Fingerprint
from fusewise.profiles import store
from fusewise.profiles.variables import switched_on
from fusewise.report.table import Column, Section, facts
from fusewise.shape import DType, format_size

SWITCHES = (
    "NCCL_NVLS_ENABLE",
    "NCCL_WIN_ENABLE",
    "NCCL_CUMEM_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "TORCH_SYMMMEM",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
    "FUSEWISE_HOME",
    "FUSEWISE_SITE_DIR",
    "FUSEWISE_CACHE_DIR",
    "FUSEWISE_PROFILE",
    "FUSEWISE_STRICT",
    "FUSEWISE_CAP",
    "FUSEWISE_DEBUG",
    "FUSEWISE_VLLM",
    "FUSEWISE_SGLANG",
    "FUSEWISE_REPLAY_TIMEOUT_S",
    "FUSEWISE_MEASURING_LOCK",
)
_BACKENDS = (
    Column("backend", "backend"),
    Column("provider", "provider"),
    Column("available", "available"),
    Column("reason", "why not, and what to do"),
)
_PROFILES = (Column("dtype", "of"), Column("where", "where"), Column("level", "level"))


@bordered
def doctor(tp: TpOption = None, fmt: FormatOption = "table") -> None:
    """This node, its profiles, every backend: available, or why not.

    Cheap: nothing is built and no GPU memory is touched. `fusewise tune` tries for real.
    """
    node = this_node(tp)
    write(
        [
            _node(node),
            Section("backends", _BACKENDS, _backends(node), "Backends"),
            _profiles(node),
        ],
        fmt,
    )


def _node(node: Fingerprint) -> Section:
    mark = node.model_dump()
    shown = list(mark.items())
    switches = {name: os.environ.get(name) for name in SWITCHES}
    shown += switches.items()
    free = None
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        shown.append(("shared memory free", format_size(max(1, free))))
    record = mark | {"shared_memory_free_bytes": free} | switches
    return replace(facts("node", record, shown, "Node"), notes=tuple(_ill(os.environ)))


def _ill(environ: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with our variables, as whoever reads them says it."""
    from fusewise.backends.native.watchdog import replay_timeout_s

    readers: tuple[Callable[[Mapping[str, str]], Any], ...] = (
        explicit_cap,
        partial(mode, "vllm"),
        partial(mode, "sglang"),
        partial(switched_on, "FUSEWISE_STRICT"),
        partial(switched_on, "FUSEWISE_DEBUG"),
        partial(replay_timeout_s, inf),
    )
    for read in readers:
        try:
            read(environ)
        except FusewiseError as error:
            yield str(error)


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


def _profiles(node: Fingerprint) -> Section:
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for dtype in get_args(DType):
        try:
            found = store.find_profile(node, dtype)
        except FusewiseError as error:  # the doctor names what is ill, and goes on
            rows.append({"dtype": dtype, "where": str(error), "level": None})
            continue
        rows.append({"dtype": dtype, "where": found.where, "level": found.level})
        notes += found.notes
    places = {
        "user's profiles": str(store.user_dir()),
        "site's profiles": str(store.site_dir()),
        "packaged profiles": ", ".join(store.packaged_names()),
    }
    notes += [f"{name}: {place}" for name, place in places.items()]
    return Section("profiles", _PROFILES, rows, "Profiles", tuple(dict.fromkeys(notes)))
