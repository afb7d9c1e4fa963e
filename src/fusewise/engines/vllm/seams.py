"""Where this package touches vLLM: each place by name, probed before it is used.

A seam is a module, a qualified name in it and, for functions, the parameters it must take. The
tests check the same list against the sources of every vLLM release from 0.20 to 0.33, so a seam
that moves is named there first. Nothing here decides anything.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_WRAPPED = "_fusewise_wrapped"

# The attribute of PassConfig that carries a decision; ``mark.py`` says what is in it.
MARK = "_fusewise"


@dataclass(frozen=True)
class Seam:
    """One place in vLLM.

    Args:
        what: what we use it for.
        module: where it is defined.
        name: qualified name in the module.
        takes: parameters a function must have, in this order, with any others between.
    """

    what: str
    module: str
    name: str
    takes: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.module}:{self.name} ({self.what})"


_CONFIG = "vllm.config.vllm"
_COMMUNICATOR = "vllm.distributed.device_communicators.cuda_communicator"
_FUSION = "vllm.compilation.passes.fusion.allreduce_rms_fusion"

# The cap is set in the process that builds the config; the rest runs in the workers.
CONFIG_SEAMS = (
    Seam(
        "the cap's field",
        "vllm.config.compilation",
        "PassConfig.fi_allreduce_fusion_max_size_mb",
    ),
    Seam(
        "the cap in force",
        "vllm.config.compilation",
        "PassConfig.flashinfer_max_size",
        ("self", "world_size"),
    ),
    Seam("the moment to set it", _CONFIG, "VllmConfig._set_compile_ranges", ("self",)),
    Seam("the config inside a worker", _CONFIG, "get_current_vllm_config_or_none", ()),
)
WORKER_SEAMS = (
    Seam(
        "the moment before all-reduces are built",
        _COMMUNICATOR,
        "CudaCommunicator.__init__",
        ("self", "cpu_group", "device_group", "unique_name"),
    ),
    Seam("the plain all-reduce", _COMMUNICATOR, "CudaCommunicator.all_reduce", ("self", "input_")),
)
# Looked for only where a worker runs with our cap: the module imports FlashInfer.
TABLE_SEAM = Seam(
    "the table that plain FlashInfer reads", _FUSION, "FI_ALLREDUCE_FUSION_MAX_SIZE_MB"
)
FUSED_SEAM = Seam("the fused kernel, looked up when called", _FUSION, "flashinfer_comm")


def missing(seams: Iterable[Seam]) -> list[str]:
    """One line per seam this vLLM does not have, or has with other parameters."""
    return [f"{seam}: {fault}" for seam in seams if (fault := _fault(seam))]


def _fault(seam: Seam) -> str | None:
    try:
        found = resolve(seam)
    except (ImportError, AttributeError) as error:
        return f"not found, {error}"
    if seam.takes is None:
        return None
    return parameters_fault(seam, list(inspect.signature(found).parameters))


def parameters_fault(seam: Seam, parameters: list[str]) -> str | None:
    """None when ``seam.takes`` is a subsequence of ``parameters``."""
    rest = iter(parameters)
    if all(name in rest for name in seam.takes or ()):
        return None
    return f"takes ({', '.join(parameters)})"


def resolve(seam: Seam) -> Any:
    """The object behind a seam; imports its module.

    Raises:
        ImportError, AttributeError: it is not there.
    """
    found: Any = importlib.import_module(seam.module)
    for part in seam.name.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[part] if part in fields else getattr(found, part)
    return found


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replaces ``owner.name`` by ``around(original, *args, **kwargs)``, once.

    A second call for the same place does nothing, so loading the plugin twice is harmless.
    """
    original = getattr(owner, name)
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapper, _WRAPPED, True)
    setattr(owner, name, wrapper)
