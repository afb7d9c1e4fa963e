"""Where this package touches SGLang: each place by name, probed before it is used.

``tests/data/sglang_seams.json`` records them release by release. Hooks go through SGLang's own
registry of plugins, which also replaces a hooked function where other modules imported it by name.
Nothing here decides anything.
"""

from __future__ import annotations

from fusewise.engines.seams import Seam

_CONTEXT = "sglang.srt.runtime_context"
_FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
_GATE = "sglang.srt.layers.layer_boundary.residual.add_norm"

# Every process that runs a model has loaded it, and with it all modules that are hooked: so hooking
# them imports nothing. A process without it, such as the command line's, has nothing to decide.
WORKER_MODULE = "sglang.srt.managers.scheduler"

WORKSPACE_SEAM = Seam(
    "the moment to decide: all ranks, before anything is captured",
    "sglang.srt.model_executor.runner.base_runner",
    "BaseRunner._pre_initialize_flashinfer_allreduce_workspace",
    ("self",),
)
GATE_SEAM = Seam("whether to fuse", _GATE, "flashinfer_ar_fusion_applies", ("batch_size",))
PLAIN_SEAM = Seam(
    "whether FlashInfer's plain all-reduce is used",
    _FUSION,
    "can_use_flashinfer_allreduce",
    ("input_",),
)
REGISTRY_SEAM = Seam(
    "SGLang's registry of hooks",
    "sglang.srt.plugins.hook_registry",
    "HookRegistry.register",
    ("target", "hook", "hook_type"),
)
HOOKED_SEAMS = (WORKSPACE_SEAM, GATE_SEAM, PLAIN_SEAM)
READ_SEAMS = (
    Seam("its threshold", _GATE, "FUSE_ALLREDUCE_MAX_BATCH_SIZE"),
    Seam("the backend", _FUSION, "resolve_flashinfer_allreduce_fusion_backend", ()),
    Seam("the ranks it fuses over", _FUSION, "resolve_fusion_group", ("use_attn_tp_group",)),
    Seam("the fused kernel, looked up when called", _FUSION, "_flashinfer_comm"),
    Seam("its options", _CONTEXT, "get_exec", ()),
    Seam("its groups", _CONTEXT, "get_parallel", ()),
    Seam(
        "the plain all-reduce",
        "sglang.srt.distributed.parallel_state",
        "GroupCoordinator.all_reduce",
        ("self", "input_"),
    ),
)
