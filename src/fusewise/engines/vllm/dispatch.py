"""What vLLM does by itself at each message size, and the rule that caps its fusion. Pure.

Two questions vLLM answers in two places that do not know each other: up to which size it fuses
(``threshold``), and which all-reduce runs where it does not (``unfused_choice``). The rule of
vLLM issue 44079 joins them: fuse no further than the size at which the active fast all-reduce
takes over. The numbers are ``tables.py``'s; nothing here probes a node.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from fusewise.engines.base import EngineSettings, RuleCap, Threshold
from fusewise.engines.vllm.tables import (
    CUSTOM_BUFFER_BYTES,
    CUSTOM_WORLD_SIZES,
    FIELD_UNIT_BYTES,
    Tables,
    tables_of,
)
from fusewise.errors import InputError
from fusewise.operation import unfused_path
from fusewise.shape import format_size

MNNVL = "flashinfer.mnnvl"
FlashInferBackend = Literal["auto", "trtllm", "mnnvl"]


@dataclass(frozen=True)
class VllmSettings(EngineSettings):
    """One vLLM on one node: all that decides which all-reduce kernel runs at which size.

    Args:
        version: ``"0.33"``, ``"0.33.0"``; only the first two numbers choose the tables.
        sm, world_size, multicast, dtype: as in the base. Without multicast vLLM's symmetric
            memory is off.
        nccl_symm_mem: ``VLLM_USE_NCCL_SYMM_MEM`` (default 0).
        symm_mem: ``VLLM_ALLREDUCE_USE_SYMM_MEM`` (default 1).
        flashinfer_all_reduce: ``VLLM_ALLREDUCE_USE_FLASHINFER``; None for the version's default.
        flashinfer_backend: ``VLLM_FLASHINFER_ALLREDUCE_BACKEND``.
        custom_all_reduce: False with ``--disable-custom-all-reduce``.
        fully_connected: every pair of GPUs has NVLink.
        batch_invariant: ``VLLM_BATCH_INVARIANT``.
        pcie_ipc: ``VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC``.

    Raises:
        InputError: the version is not one whose sources were read, or a number is out of range.
    """

    nccl_symm_mem: bool = False
    symm_mem: bool = True
    flashinfer_all_reduce: bool | None = None
    flashinfer_backend: FlashInferBackend = "auto"
    custom_all_reduce: bool = True
    fully_connected: bool = True
    batch_invariant: bool = False
    pcie_ipc: bool = False
    tables: Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.sm < 10:
            raise InputError(
                "vLLM settings out of range",
                expected="world_size >= 1 and sm >= 10",
                got=f"world_size {self.world_size}, sm {self.sm}",
            )
        object.__setattr__(self, "tables", tables_of(self.version))

    @property
    def threshold(self) -> Threshold | None:
        """vLLM's own table: a size, whatever the hidden size."""
        if self.batch_invariant and self.tables.invariant_is_plain:
            return None
        size = self.tables.fusion_max_bytes.get(self.sm, {}).get(self.world_size)
        return None if size is None else Threshold(message_bytes=size)

    def fused_choice(self, message_bytes: int, hidden_size: int = 0) -> str:
        """The fused kernel vLLM runs.

        FlashInfer's ``mnnvl`` backend chooses between its strategies by itself: one path. With
        ``trtllm`` it is one-shot up to and including vLLM's limit, two-shot above.
        """
        if self.fused_backend == "mnnvl":
            return MNNVL
        limit = self.tables.one_shot_max_bytes.get(self.sm, {}).get(self.world_size)
        one_shot = limit is None or message_bytes <= limit
        return "flashinfer.one_shot" if one_shot else "flashinfer.two_shot"

    @property
    def fused_backend(self) -> Literal["trtllm", "mnnvl"]:
        """Which of FlashInfer's backends this vLLM fuses with on one node."""
        if self.flashinfer_backend != "auto":
            return self.flashinfer_backend
        return "mnnvl" if self.tables.prefers_mnnvl and self.multicast else "trtllm"

    @property
    def flashinfer_active(self) -> bool:
        """Whether FlashInfer's plain all-reduce is asked at all for unfused messages."""
        if self.batch_invariant and self.tables.invariant_is_plain:
            return False
        if self.flashinfer_all_reduce is None:
            return self.tables.flashinfer_default
        return self.flashinfer_all_reduce

    @property
    def table_read_elsewhere(self) -> bool:
        """Whether more than the compilation pass reads the fusion table.

        FlashInfer's plain all-reduce does, unless vLLM holds a size of its own for it, and models
        that call the fused kernel by hand; both whatever the compilation config says.
        """
        return self.tables.hand_fused or (self.flashinfer_active and not self._mnnvl_limit)

    def unfused_choice(self, message_bytes: int, hidden_size: int = 0) -> str:
        """The path that runs today where this vLLM does not fuse: all-reduce, then the norm.

        FlashInfer's plain all-reduce is asked up to the fusion table's size. Its ``mnnvl``
        workspace may refuse large messages within that; the answer here is the table's.
        """
        return self._dispatch(message_bytes, max(self.cap_bytes() or 0, self._mnnvl_limit))

    def displaced_choice(self, message_bytes: int, hidden_size: int = 0) -> str:
        """The path that would run if the fusion table ended below ``message_bytes``.

        FlashInfer's plain all-reduce reads the same table, so lowering the table takes it away
        too, except where vLLM holds a separate size for it.
        """
        return self._dispatch(message_bytes, self._mnnvl_limit)

    def _dispatch(self, message_bytes: int, flashinfer_limit: int) -> str:
        takes = {
            "nccl_symm": self._nccl_symm_takes(message_bytes),
            "flashinfer": self.flashinfer_active and message_bytes <= flashinfer_limit,
            "custom": message_bytes % 16 == 0 and message_bytes < self.custom_limit,
            "symm_mem": self.symm_mem_active and message_bytes <= self._symm_mem_limit,
            "nccl": True,
        }
        backend = next(name for name in self.tables.dispatch if takes[name])
        # Asked behind NCCL's symmetric memory and before FlashInfer's plain all-reduce.
        if backend != "nccl_symm" and self.pcie_ipc and self.tables.has_pcie_ipc:
            backend = "flashinfer_pcie_ipc"
        if backend == "symm_mem":
            backend = "multimem" if self._multimem else "symm_mem.two_shot"
        return unfused_path(backend)

    @property
    def symm_mem_active(self) -> bool:
        """Whether torch's symmetric memory is up: switched on, multicast, listed, bf16 only."""
        return (
            self.symm_mem
            and self.multicast
            and self.dtype == "bfloat16"
            and self._symm_mem_limit > 0
        )

    @property
    def custom_limit(self) -> int:
        """The size at which custom all-reduce stops (it takes strictly less); 0 where it is off.

        The table applies only beside symmetric memory, which does not look at the dtype then.
        """
        connected = self.world_size == 2 or self.fully_connected
        if not (self.custom_all_reduce and connected and self.world_size in CUSTOM_WORLD_SIZES):
            return 0
        if self.symm_mem and self.multicast and self._symm_mem_limit:
            return self._custom_beside_symm_mem
        return CUSTOM_BUFFER_BYTES

    @property
    def _custom_beside_symm_mem(self) -> int:
        table = self.tables.custom_max_bytes.get(self.sm, {})
        return min(table.get(self.world_size, CUSTOM_BUFFER_BYTES), CUSTOM_BUFFER_BYTES)

    @property
    def _symm_mem_limit(self) -> int:
        return self.tables.symm_mem_max_bytes.get(self.sm, {}).get(self.world_size, 0)

    @property
    def _multimem(self) -> bool:
        return self.world_size in self.tables.multimem_world_sizes.get(self.sm, ())

    @property
    def _mnnvl_limit(self) -> int:
        """The size kept apart from the fusion table for FlashInfer's plain mnnvl all-reduce."""
        sizes = self.tables.mnnvl_max_bytes or {}
        return sizes.get((self.sm, self.world_size), 0) if self.fused_backend == "mnnvl" else 0

    def _nccl_symm_takes(self, message_bytes: int) -> bool:
        """``should_nccl_symm_mem_allreduce``: outside the range where custom is preferred."""
        if not self.nccl_symm_mem:
            return False
        bounds = (self.tables.nccl_symm_ranges or {}).get(self.world_size)
        if bounds is None:
            return self.world_size > self.tables.nccl_symm_above_world_size
        return message_bytes <= bounds[0] or message_bytes >= bounds[1]

    def rule(self, hidden_size: int | None = None) -> RuleCap:
        """min(vLLM's cap, size at which the active fast all-reduce takes over): 44079's rule.

        Fast all-reduces are NCCL symmetric memory, from the upper end of the range in which vLLM
        prefers its custom kernel, and multimem, from the custom kernel's table size. Where
        neither is available vLLM's cap stands.
        """
        cap = self.cap_bytes()
        if cap is None:
            return RuleCap(None, False, f"vLLM {self.tables.read_in} does not fuse here")
        if self.fused_backend == "mnnvl":
            return RuleCap(
                cap, False, "it fuses with FlashInfer's mnnvl, not measured on this node"
            )
        takeovers: list[tuple[int, str, str]] = []
        bounds = (self.tables.nccl_symm_ranges or {}).get(self.world_size)
        if self.nccl_symm_mem and bounds is not None:
            takeovers.append((bounds[1], "NCCL symmetric memory", "nccl_symm"))
        if self.symm_mem_active and self._multimem:
            takeovers.append((self._custom_beside_symm_mem, "multimem", "multimem"))
        # Only where the dispatch would really come to it: others may be asked before.
        runs = [t for t in takeovers if self.displaced_choice(t[0]) == unfused_path(t[2])]
        if not runs:
            return RuleCap(cap, False, "no faster all-reduce takes over below the engine's cap")
        size, name, _ = min(runs)
        takes = f"{name} takes over at {format_size(size)}"
        if size >= cap:
            return RuleCap(cap, False, f"{takes}, not below the cap")
        return RuleCap(size, True, takes)

    def flag(self, cap_bytes: int) -> str:
        """What to paste behind ``vllm serve MODEL`` to set the cap by hand.

        A cap of 0 turns the fusion off: as a size, vLLM would make it a compile range of no tokens.
        """
        passes = f'{{"fi_allreduce_fusion_max_size_mb": {field_mb(cap_bytes)!r}}}'
        if cap_bytes == 0:
            passes = '{"fuse_allreduce_rms": false}'
        return f"--compilation-config '{{\"pass_config\": {passes}}}'"

    def environment(self, cap_bytes: int) -> str | None:
        """The environment variable the flag needs beside it, or None.

        FlashInfer's plain all-reduce reads the table, not the field: where it is on, it would take
        the messages that the flag sends away from the fused kernel. Where vLLM holds a tuned size
        of its own for it, it is meant to, and stays.
        """
        cap = self.cap_bytes()
        if not self.flashinfer_active or self._mnnvl_limit:
            return None
        if cap is not None and cap_bytes < cap:
            return "VLLM_ALLREDUCE_USE_FLASHINFER=0"
        return None

    def notes(self, measured: Collection[str] = ()) -> list[str]:
        """About FlashInfer: its backend, and its plain all-reduces."""
        notes = []
        backend = self.fused_backend
        if self.tables.prefers_mnnvl:
            other = "trtllm" if backend == "mnnvl" else "mnnvl"
            note = (
                f"This is about FlashInfer's {backend} backend, with which vLLM {self.version} "
                f"fuses here; --flashinfer-backend {other} asks about the other, as "
                f"VLLM_FLASHINFER_ALLREDUCE_BACKEND={other} selects it."
            )
            if backend == "mnnvl" and MNNVL not in measured:
                note += (
                    " This profile holds no times of mnnvl, and trtllm's do not decide about it: "
                    "the cap stays. `fusewise tune` on such a node measures it."
                )
            notes.append(note)
        if self.flashinfer_active and not self._mnnvl_limit:
            notes.append(
                "FlashInfer's plain all-reduce reads the fusion table and is asked first: setting "
                "the field alone leaves it in place up to the table's size. The fusewise plugin "
                "lowers both; by hand set VLLM_ALLREDUCE_USE_FLASHINFER=0 beside the flag."
            )
        if self.pcie_ipc and self.tables.has_pcie_ipc:
            notes.append(
                "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC=1 sends unfused messages to an all-reduce "
                "that was not measured."
            )
        return notes


def field_mb(cap_bytes: int) -> float:
    """A cap as ``fi_allreduce_fusion_max_size_mb`` takes it: binary MB, exact for any bytes."""
    return cap_bytes / FIELD_UNIT_BYTES
