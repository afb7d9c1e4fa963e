"""The vLLM plugin's entry point: loaded by vLLM in each of its processes, by ``register``.

``FUSEWISE_VLLM`` is ``cap`` (default), ``full`` or ``off``. Whatever goes wrong here is one line in
the log and leaves vLLM as it was. Importing this file imports neither vLLM nor torch.
"""

from __future__ import annotations

import logging
import os
from typing import Any

log = logging.getLogger("vllm.plugins.fusewise")


def register() -> None:
    """Prepares this process; safe to call any number of times. Never raises."""
    try:
        fault = _prepare()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        log.warning("fusewise does nothing: %s", fault)


def _prepare() -> str | None:
    """Wraps the seams; the reason when it does not."""
    import importlib.metadata

    from fusewise.engines.plugin import mode
    from fusewise.engines.vllm import narrow, seams
    from fusewise.engines.vllm.tables import tables_of

    if mode("vllm", os.environ) == "off":
        return None

    tables_of(importlib.metadata.version("vllm"))  # raises for a version nobody read
    moved = seams.missing((*seams.CONFIG_SEAMS, *seams.WORKER_SEAMS))
    if moved:
        return f"this vLLM has moved {'; '.join(moved)}"
    from vllm.config.vllm import VllmConfig
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

    seams.wrap(VllmConfig, "_set_compile_ranges", narrow.around_set_compile_ranges)
    seams.wrap(CudaCommunicator, "__init__", _around_communicator_init)
    return None


def _around_communicator_init(original: Any, communicator: Any, *args: Any, **kwargs: Any) -> None:
    """In a worker: the table before vLLM's all-reduces are built, our kernels after."""
    from fusewise.engines.vllm import narrow, takeover

    config = _guarded(_current_config)
    if config is not None:
        _guarded(narrow.lower_table, config)
    original(communicator, *args, **kwargs)
    if config is not None:
        _guarded(takeover.install, communicator, config)


def _guarded(step: Any, *args: Any) -> Any:
    try:
        return step(*args)
    except Exception as error:
        log.warning("fusewise leaves this worker as it is: %s: %s", type(error).__name__, error)
        return None


def _current_config() -> Any:
    from vllm.config.vllm import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()
