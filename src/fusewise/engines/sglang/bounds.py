"""What bounds SGLang's fusion in this process, and the hooks that ask it.

The hooks are in place from the start and do nothing until all ranks have agreed. They ask where
SGLang decides, in plain Python, never inside a custom operator: what was chosen is run there.
Dynamo traces them: like SGLang's own, they compare the symbolic size last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewise.engines.router import Router


@dataclass
class Bounds:
    """Equal on all ranks of a group. None: as SGLang has it.

    Args:
        max_tokens: SGLang fuses no longer batches.
        plain_bytes: FlashInfer's plain all-reduce takes no larger messages.
        router: runs what FlashInfer's fused kernel is called for.
    """

    max_tokens: int | None = None
    plain_bytes: int | None = None
    router: Router | None = None


BOUNDS = Bounds()


def around_gate(original: Any, batch_size: Any) -> Any:
    """``flashinfer_ar_fusion_applies``: whether a batch is fused."""
    applies, limit = original(batch_size), BOUNDS.max_tokens
    return applies if limit is None else applies and batch_size <= limit


def around_plain(original: Any, input_: Any, **kwargs: Any) -> Any:
    """``can_use_flashinfer_allreduce``: whether FlashInfer's plain all-reduce takes a message."""
    usable, limit = original(input_, **kwargs), BOUNDS.plain_bytes
    if limit is None:
        return usable
    return usable and input_.numel() * input_.element_size() <= limit


def around_fused(original: Any, *args: Any, **kwargs: Any) -> Any:
    """``flashinfer.comm.allreduce_fusion``: full mode's plan, once it is there."""
    router = BOUNDS.router
    if router is None:
        return original(*args, **kwargs)
    return router.fused(original, *args, **kwargs)
