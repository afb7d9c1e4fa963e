"""Where this package touches vLLM: each place by name, probed before it is used.

A seam is a module, a qualified name in it and, for functions, the parameters it must take. The
tests check the same list against the sources of every vLLM release from 0.20 to 0.33, so a seam
that moves is named there first. Nothing here decides anything.
"""

from __future__ import annotations

from fusewise.engines.seams import Seam, missing, parameters_fault, resolve, wrap

__all__ = ["Seam", "missing", "parameters_fault", "resolve", "wrap"]  # with what is below

# The attribute of PassConfig that carries a decision; ``mark.py`` says what is in it.
MARK = "_fusewise"

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
