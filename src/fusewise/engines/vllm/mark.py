"""What was decided about one engine, written once on its config and carried by it to its workers.

Plain data under ``seams.MARK`` on vLLM's ``PassConfig``, so that a config still unpickles where
this package is absent; no dataclass field, so neither its hash nor its repr sees it. A failure is
written too: configs are rebuilt (``replace``, ``with_hf_config``), and nothing is decided twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fusewise.engines.vllm.seams import MARK
from fusewise.engines.vllm.tables import FIELD_UNIT_BYTES


@dataclass(frozen=True)
class Mark:
    """A decision. Sizes in binary MB, as vLLM's field takes them.

    Args:
        mode: ``none`` leaves vLLM as it is.
        cap_mb: how far fusing never loses: what rules wherever full mode does not.
        wide_mb: how far full mode fuses, once all ranks have taken it up.
        table: something besides the fusion reads vLLM's table.
        fuses: the fusion is on.
        alone: every rank builds a config of its own, so nothing is set before all agree.
        endpoints: the user's own compile-range endpoints.
        fault: why nothing could be decided.
    """

    mode: Literal["cap", "full", "none"] = "none"
    cap_mb: float | None = None
    wide_mb: float | None = None
    table: bool = False
    fuses: bool = False
    alone: bool = False
    endpoints: list[int] | None = None
    fault: str | None = None

    @property
    def asks_workers(self) -> bool:
        """Whether a worker has anything to agree on with its peers."""
        return self.alone or self.mode == "full" or (self.mode == "cap" and self.table)

    @property
    def proposal(self) -> str:
        """What ranks must have in common, as a reader of the log understands it."""
        if self.mode == "none":
            return "nothing"
        far = "" if self.wide_mb is None else f", then {self.wide_mb:g} MB"
        where = [name for name, on in (("pass", self.fuses), ("table", self.table)) if on]
        return f"{self.mode}, {self.cap_mb:g} MB{far}, {' and '.join(where) or 'nowhere'}"

    @property
    def cap_bytes(self) -> int:
        """``cap_mb`` in bytes."""
        return in_bytes(self.cap_mb or 0)


def in_bytes(size_mb: float) -> int:
    """As ``PassConfig.flashinfer_max_size`` converts the field."""
    return int(size_mb * FIELD_UNIT_BYTES)


def read(config: Any) -> Mark | None:
    """The mark on a ``VllmConfig``; None where nobody has decided."""
    found = getattr(config.compilation_config.pass_config, MARK, None)
    return None if found is None else Mark(**found)


def write(config: Any, mark: Mark) -> None:
    """Marks a ``VllmConfig``."""
    setattr(config.compilation_config.pass_config, MARK, asdict(mark))


def set_fusion(config: Any, mark: Mark, size_mb: float) -> None:
    """vLLM's fusion ends at ``size_mb``: its own field, or the switch where not one token fits."""
    if not mark.fuses:
        return
    passes = config.compilation_config.pass_config
    model = config.model_config
    row_bytes = model.get_hidden_size() * model.dtype.itemsize if model else 1
    # An endpoint of 0 tokens is none vLLM accepts.
    passes.fuse_allreduce_rms = in_bytes(size_mb) >= row_bytes
    world_size = config.parallel_config.tensor_parallel_size
    if passes.fuse_allreduce_rms and in_bytes(size_mb) != passes.flashinfer_max_size(world_size):
        passes.fi_allreduce_fusion_max_size_mb = size_mb


def set_fusion_again(config: Any, mark: Mark, size_mb: float) -> None:
    """``set_fusion`` where vLLM has already made compile ranges of another size."""
    set_fusion(config, mark, size_mb)
    config.compilation_config.compile_ranges_endpoints = mark.endpoints
    config._set_compile_ranges()
