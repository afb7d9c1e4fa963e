"""This SGLang as it runs in a worker: whether it fuses, over which ranks, with which kernels.

Reads what SGLang has resolved, after it has built its groups and the fusion's workspace. Decides
nothing and changes nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusewise.engines.base import FlagValue
from fusewise.engines.sglang.dispatch import SGLangSettings
from fusewise.engines.sglang.engine import settings_on
from fusewise.engines.sglang.seams import GATE_SEAM, PLAIN_SEAM
from fusewise.engines.sglang.tables import known_version
from fusewise.errors import FusewiseError, UnavailableError
from fusewise.shape import DType, parse_dtype

if TYPE_CHECKING:
    from fusewise.node import Fingerprint

log = logging.getLogger("sglang.plugins.fusewise")


@dataclass(frozen=True)
class Live:
    """One worker.

    Args:
        tp_group: SGLang's coordinator of the tensor-parallel group.
        hidden_size: the model's.
        dtype: the model's.
        flags: fields of ``SGLangSettings``, as SGLang resolved them.
        one_stream: False with ``--enable-pdmux``: prefill and decode run at once, and a workspace
            of ours takes one call after the other.
    """

    tp_group: Any
    hidden_size: int
    dtype: DType
    flags: dict[str, FlagValue]
    one_stream: bool

    def settings(self, node: Fingerprint) -> SGLangSettings:
        """SGLang on that node.

        Raises:
            FusewiseError: a version or a switch that cannot be judged, or another threshold than
                the one known.
        """
        version = importlib.metadata.version("sglang")
        known, warning = known_version(version)
        if warning:
            log.warning("fusewise: %s", warning)
        settings = settings_on(known, node, self.dtype, os.environ, self.flags)
        found = importlib.import_module(GATE_SEAM.module).FUSE_ALLREDUCE_MAX_BATCH_SIZE
        if found != settings.tables.max_tokens:
            raise FusewiseError(
                f"the threshold of SGLang {version} is not the one known here",
                expected=f"{settings.tables.max_tokens} tokens",
                got=str(found),
            )
        return settings


def read(runner: Any) -> Live | None:
    """What SGLang resolved; None where it would not fuse a single token.

    Raises:
        UnavailableError: it fuses over other ranks than the tensor-parallel group's, or runs
            all-reduces nobody read.
    """
    from sglang.srt.runtime_context import get_exec, get_parallel

    fusion = importlib.import_module(PLAIN_SEAM.module)
    fuses = importlib.import_module(GATE_SEAM.module).flashinfer_ar_fusion_applies
    comm, parallel = get_exec().comm, get_parallel()
    if parallel.tp_size < 2 or not fuses(1):
        return None
    tp_group = parallel.tp_group
    for attention in (True, False):
        size, _, group = fusion.resolve_fusion_group(use_attn_tp_group=attention)
        if (size > 1 or attention) and list(group.ranks) != list(tp_group.ranks):
            raise UnavailableError(
                "SGLang fuses over other ranks than those of the tensor-parallel group",
                expected=str(list(tp_group.ranks)),
                got=str(list(group.ranks)),
            )
    if comm.enable_mscclpp:
        raise UnavailableError("SGLang's MSCCL++ all-reduce (--enable-mscclpp) is not known here")
    custom = tp_group.ca_comm
    flags: dict[str, FlagValue] = {
        "flashinfer_backend": str(fusion.resolve_flashinfer_allreduce_fusion_backend()),
        "custom_all_reduce": custom is not None and not custom.disabled,
        "custom_v2": hasattr(custom, "has_multicast"),  # else vLLM's kernel was built
        "symm_mem": bool(comm.enable_torch_symm_mem),
        "nccl_symm_mem": bool(comm.enable_symm_mem),
    }
    if flags["custom_v2"]:  # its own kernels know whether multicast is bound for them
        flags["multicast"] = bool(custom.has_multicast)
    model = runner.model_runner
    return Live(
        tp_group,
        int(model.model_config.hidden_size),
        parse_dtype(str(model.dtype)),
        flags,
        one_stream=not runner.enable_pdmux,
    )
