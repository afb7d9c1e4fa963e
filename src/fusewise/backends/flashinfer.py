"""FlashInfer's fused all-reduce + residual + RMSNorm, backend ``trtllm``, one-shot and two-shot.

One workspace per strategy, so that the state of one never meets the other. Known behaviour of
0.6.11.post2, left to verification on the node:

- One-shot marks an empty slot with -0.0 and turns -0.0 inputs into +0.0.
- ``trigger_completion_at_end`` stays True: released early, a dependent kernel can read outputs
  that are not written yet (NaN at few tokens).
- Under programmatic dependent launch the kernels load ``residual`` before they wait for the
  kernel ahead of them. A kernel ahead that triggers early and writes ``residual`` last races.

Never FlashInfer's backend ``mnnvl``, which is ``flashinfer_mnnvl.py``'s, and never ``auto``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fusewise.backends.base import Backend
from fusewise.backends.flashinfer_limits import (
    WORKSPACE_ROW,
    WORLD_SIZES,
    launch_problem,
    package_reason,
    workspace_elements,
)
from fusewise.backends.steps import not_on_one_host, together
from fusewise.errors import InputError, UnavailableError
from fusewise.profiles.schema import Numerics
from fusewise.shape import ELEMENT_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.node import Fingerprint
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape


class FlashInfer(Backend):
    """What FlashInfer's kernels share. One workspace each, sized in elements."""

    provider = "flashinfer"
    fused = True
    # allreduce_sum: fp32 in rank order with fp32_acc, then rounded before the residual is added.
    numerics = Numerics(accumulation="float32", order="rank", rounds_sum=True)
    takes_no_residual = False
    takes_weight_bias = False
    module: ClassVar[str] = "trtllm_comm"  # of kernels, as FlashInfer names what it compiles
    one_shot: ClassVar[bool | None]  # None: FlashInfer chooses

    @classmethod
    def available(cls, node: Fingerprint) -> str | None:
        reason = package_reason(node, cls.module) or not_on_one_host(node.nodes, node.world_size)
        if reason:
            return reason
        if (node.sm or 0) // 10 not in (9, 10):
            return f"its kernels are built for sm_90 and sm_100, this is sm_{node.sm}; use nccl"
        if node.world_size not in WORLD_SIZES:
            return f"takes {WORLD_SIZES} ranks, not {node.world_size}; use nccl"
        return None

    def __init__(self, group: Group, max_shape: Shape) -> None:
        super().__init__(group, max_shape)
        self._elements = workspace_elements(max_shape, group.world_size)
        self._workspace: Any = None
        self._comm = together(group, f"{self.id}: load kernels", self._load)
        group.agree(f"{self.id}: workspace size", [self._elements, max_shape.dtype])
        # Inside the provider's own collective nobody votes: the likeliest failure is asked before.
        together(group, f"{self.id}: memory", self._check_memory)
        try:
            together(group, f"{self.id}: workspace", self._make_workspace)
        except UnavailableError:
            self._release()
            raise
        parameters = inspect.signature(self._comm.allreduce_fusion).parameters
        self.takes_weight_bias = "weight_bias" in parameters

    @staticmethod
    def _load() -> Any:
        """Imports FlashInfer and compiles or loads its kernels: what can fail on one rank alone."""
        from flashinfer import comm
        from flashinfer.comm.trtllm_ar import get_trtllm_comm_module

        get_trtllm_comm_module()
        return comm

    def _workspace_rows(self) -> int:
        rows = self._elements // WORKSPACE_ROW
        # Two-shot stages input and sum: 2 · message bytes in a buffer of world_size · elements ·
        # 2 bytes, whatever the dtype. Two ranks in fp32 need twice the rows for that.
        message_bytes = self._elements * ELEMENT_BYTES[self.max_shape.dtype]
        staged = -(-message_bytes // (self.group.world_size * WORKSPACE_ROW))
        return rows if self.one_shot else max(rows, staged)

    def _needed_bytes(self) -> int:
        elements = self.group.world_size * self._workspace_rows() * WORKSPACE_ROW
        # The staging buffer is of 2-byte words; the Lamport buffer has three turns of the dtype's.
        return elements * (2 + 3 * ELEMENT_BYTES[self.max_shape.dtype])

    def _check_memory(self) -> None:
        needed = self._needed_bytes()
        free, _ = torch.cuda.mem_get_info(self.group.device)
        if needed > free:
            raise UnavailableError(
                "the GPU has too little free memory for the workspace",
                expected=f"{needed} bytes",
                got=f"{free} bytes",
                hint="Lower max_message_bytes, or leave flashinfer out.",
            )

    def _make_workspace(self) -> None:
        self._create("trtllm", group=self.group.process_group)

    def _create(self, backend: str, **ranks: Any) -> None:
        with torch.cuda.device(self.group.device):
            self._workspace = self._comm.create_allreduce_fusion_workspace(
                backend=backend,
                world_size=self.group.world_size,
                rank=self.group.rank,
                max_token_num=self._workspace_rows(),
                hidden_dim=WORKSPACE_ROW,
                dtype=getattr(torch, self.max_shape.dtype),
                **ranks,
            )

    def admits(self, shape: Shape) -> str | None:
        if self._workspace is None:
            return "it is closed"
        if shape.num_tokens == 0:
            return "there is no row to reduce"
        # Empty slots hold -0.0 of the workspace's word size; 32-bit words do not read 16-bit ones.
        if (shape.dtype == "float32") != (self.max_shape.dtype == "float32"):
            return f"its workspace was initialised for {self.max_shape.dtype}"
        if self.one_shot is False and shape.num_tokens <= self.group.world_size:
            return f"two-shot needs more than {self.group.world_size} tokens"
        elements = shape.num_tokens * shape.hidden_size
        if elements > self._elements:
            element_bytes = ELEMENT_BYTES[shape.dtype]
            return (
                f"needs {elements * element_bytes} bytes of workspace, has "
                f"{self._elements * element_bytes}"
            )
        return launch_problem(shape) or self._provider_refusal(shape)

    def _provider_refusal(self, shape: Shape) -> str | None:
        shot = () if self.one_shot is None else (self.one_shot,)  # mnnvl's workspace takes none
        fits = self._workspace.is_buffer_size_sufficient(
            self.group.world_size,
            shape.num_tokens,
            shape.hidden_size,
            getattr(torch, shape.dtype),
            *shot,
        )
        return None if fits else f"flashinfer says its workspace is too small for {shape}"

    def _fuse(self, x: Tensor, pattern: int, **tensors: Any) -> None:
        if self._workspace is None:
            raise UnavailableError(f"{self.id} of {self.group} is closed")
        self._comm.allreduce_fusion(
            input=x,
            workspace=self._workspace,
            pattern=pattern,
            launch_with_pdl=True,
            trigger_completion_at_end=True,
            use_oneshot=self.one_shot,
            fp32_acc=True,
            **tensors,
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._fuse(x, self._comm.AllReduceFusionPattern.kAllReduce, output=out)
        return out

    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_bias: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        if residual is None or (weight_bias and not self.takes_weight_bias):
            raise InputError(
                f"{self.id} cannot run this call",
                expected="a residual and no weight bias",
                hint="Call it through Communicator, which picks a path that can.",
            )
        norm, total = torch.empty_like(x), torch.empty_like(x)
        bias = {"weight_bias": weight_bias} if weight_bias else {}
        self._fuse(
            x,
            self._comm.AllReduceFusionPattern.kARResidualRMSNorm,
            residual_in=residual,
            residual_out=total,
            norm_out=norm,
            rms_gamma=weight,
            rms_eps=eps,
            **bias,
        )
        return norm, total

    def close(self) -> None:
        if self._workspace is None:
            return
        torch.cuda.synchronize(self.group.device)
        self.group.barrier(f"{self.id}: close")  # a peer's late store must still find the memory
        self._release()

    def _release(self) -> None:
        workspace, self._workspace = self._workspace, None
        if workspace is not None:
            # destroy() alone leaves the buffers in a table of FlashInfer's, keyed by this list.
            self._comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace.ipc_handles)
            workspace.destroy()


class OneShot(FlashInfer):
    """Every rank pushes its rows to all peers, which sum, add and normalise as rows arrive."""

    id = "flashinfer.one_shot"
    one_shot = True


class TwoShot(FlashInfer):
    """Each rank sums the rows it owns and stores them to all peers; two barriers between."""

    id = "flashinfer.two_shot"
    one_shot = False
