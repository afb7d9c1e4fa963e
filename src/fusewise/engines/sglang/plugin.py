"""The SGLang plugin's entry point: loaded by SGLang in each of its processes, by ``register``.

``FUSEWISE_SGLANG`` is ``cap`` (default), ``full`` or ``off``. Whatever goes wrong here is one line
in the log and leaves SGLang as it was. Importing this file imports neither SGLang nor torch.
"""

from __future__ import annotations

import logging
import os
import sys

log = logging.getLogger("sglang.plugins.fusewise")


def register() -> None:
    """Prepares this process; SGLang calls it once. Never raises."""
    try:
        fault = _prepare()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        log.warning("fusewise does nothing: %s", fault)


def _prepare() -> str | None:
    """Registers the hooks where a model will run; the reason when it does not.

    Other switches are read where the ranks meet (``settle.py``), so that peers need not wait for a
    rank whose own hold nonsense.
    """
    from fusewise.engines.sglang.seams import WORKER_MODULE

    if os.environ.get("FUSEWISE_SGLANG") == "off" or WORKER_MODULE not in sys.modules:
        return None
    import importlib.metadata

    from fusewise.engines.seams import missing
    from fusewise.engines.sglang import bounds, seams, settle
    from fusewise.engines.sglang.tables import known_version

    known_version(importlib.metadata.version("sglang"))  # raises for one that nobody read
    moved = missing((seams.REGISTRY_SEAM, *seams.HOOKED_SEAMS))
    if moved:
        return f"this SGLang has moved {'; '.join(moved)}"
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = (settle.around_workspace, bounds.around_gate, bounds.around_plain)
    for seam, hook in zip(seams.HOOKED_SEAMS, hooks, strict=True):
        HookRegistry.register(f"{seam.module}.{seam.name}", hook, HookType.AROUND)
    return None
