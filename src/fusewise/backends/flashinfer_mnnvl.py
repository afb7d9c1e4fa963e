"""FlashInfer's fused all-reduce + residual + RMSNorm, backend ``mnnvl``: over NVLink multicast.

One path: FlashInfer chooses between one-shot (up to 1 MiB over all ranks) and two-shot by itself,
as vLLM lets it (``use_oneshot=None`` in ``allreduce_rms_fusion.py`` since 0.25). Read from
FlashInfer 0.6.14: ``comm/allreduce.py``, ``comm/trtllm_mnnvl_ar.py``, ``jit/comm.py`` and
``trtllm_mnnvl_allreduce.cuh``. Never asked for on a node without multicast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusewise.backends.flashinfer import FlashInfer
from fusewise.backends.flashinfer_limits import WORKSPACE_ROW
from fusewise.errors import UnavailableError
from fusewise.shape import ELEMENT_BYTES

if TYPE_CHECKING:
    from fusewise.node import Fingerprint

_BUFFERS = 3  # NUM_LAMPORT_BUFFERS
_ONE_SHOT_BYTES = 2**20  # MNNVL_ONE_SHOT_THRESHOLD, over all ranks
_STAGES = 2  # of two-shot, each with room for the whole message


class Mnnvl(FlashInfer):
    """Ranks store rows, or slices of them, once for all peers through the multicast address."""

    id = "flashinfer.mnnvl"
    module = "trtllm_mnnvl_comm"
    one_shot = None

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        reason = super().available(node)
        if reason is None and not node.multicast:
            return (
                "NVLink multicast is absent or switched off (TORCH_SYMM_MEM_DISABLE_MULTICAST,"
                " NCCL_NVLS_ENABLE=0); use flashinfer.one_shot"
            )
        return reason

    @staticmethod
    def _load() -> Any:
        from flashinfer import comm
        from flashinfer.comm.trtllm_mnnvl_ar import get_trtllm_mnnvl_comm_module

        get_trtllm_mnnvl_comm_module()
        return comm

    def _workspace_rows(self) -> int:
        """Two-shot rounds tokens up to a multiple of the ranks, at the shape's own width."""
        widest = -(-self.max_shape.hidden_size // WORKSPACE_ROW)
        return self._elements // WORKSPACE_ROW + self.group.world_size * widest

    def _needed_bytes(self) -> int:
        message_bytes = self._workspace_rows() * WORKSPACE_ROW * ELEMENT_BYTES[self.max_shape.dtype]
        return _BUFFERS * max(_ONE_SHOT_BYTES, _STAGES * message_bytes)

    def _make_workspace(self) -> None:
        from flashinfer.comm.mnnvl import TorchDistBackend

        self._create("mnnvl", comm_backend=TorchDistBackend(group=self.group.process_group))
        if not getattr(self._workspace, "mc_ptr", 0):  # as vLLM's _create_workspace asks
            raise UnavailableError("FlashInfer's workspace has no multicast address here")

    def _release(self) -> None:
        workspace, self._workspace = self._workspace, None
        if workspace is not None:
            workspace.destroy()
