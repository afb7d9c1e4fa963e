"""The vLLM plugin's entry point: loaded by vLLM in each of its processes, by ``register``.

``FUSEWISE_VLLM`` is ``cap`` (default), ``full`` or ``off``. Whatever goes wrong here is one line in
the log and leaves vLLM as it was. Importing this file imports neither vLLM nor torch.
"""

from __future__ import annotations

import logging
import os
from typing import Any

# In vllm/envs.py of every release since 0.20; ``vllm/ray/ray_env.py`` reads it.
_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"

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
    from fusewise.engines.vllm.tables import known_version

    if mode("vllm", os.environ) == "off":
        return None

    known_version(
        importlib.metadata.version("vllm")
    )  # raises for one older than all that were read
    moved = seams.missing((*seams.CONFIG_SEAMS, *seams.WORKER_SEAMS))
    if moved:
        return f"this vLLM has moved {'; '.join(moved)}"
    from vllm.config.vllm import VllmConfig
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

    seams.wrap(VllmConfig, "_set_compile_ranges", narrow.around_set_compile_ranges)
    seams.wrap(CudaCommunicator, "__init__", _around_communicator_init)
    _tell_ray()
    return None


def _tell_ray() -> None:
    """Ray's actors get our variables too: vLLM copies those whose prefix is listed here."""
    listed = [p for p in os.environ.get(_RAY_PREFIXES, "").split(",") if p.strip()]
    if "FUSEWISE_" not in listed:
        os.environ[_RAY_PREFIXES] = ",".join([*listed, "FUSEWISE_"])


def _around_communicator_init(original: Any, communicator: Any, *args: Any, **kwargs: Any) -> None:
    """In a worker: the ranks agree before vLLM's all-reduces are built; our kernels come after."""
    from fusewise.engines.vllm import settle, takeover

    agreed = None
    process_group = _guarded(settle.tensor_parallel_group, original, args, kwargs)
    if process_group is not None:
        takeover.release()
        agreed = _guarded(settle.agree, process_group)
    original(communicator, *args, **kwargs)
    if agreed is not None:
        _guarded(takeover.install, communicator, *agreed)


def _guarded(step: Any, *args: Any) -> Any:
    try:
        return step(*args)
    except Exception as error:
        log.warning("fusewise leaves this worker as it is: %s: %s", type(error).__name__, error)
        return None
