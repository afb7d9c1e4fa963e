"""What vLLM does by itself at each message size, and the rule that caps its fusion. Pure.

Two questions vLLM answers in two places that do not know each other: up to which size it fuses
(``engine_cap``), and which all-reduce runs where it does not (``unfused_choice``). The rule of
vLLM issue 44079 joins them: fuse no further than the size at which the active fast all-reduce
takes over. The numbers are ``tables.py``'s; nothing here probes a node.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Literal

from fusewise.engines.vllm.tables import (
    CUSTOM_BUFFER_BYTES,
    CUSTOM_WORLD_SIZES,
    FIELD_UNIT_BYTES,
    TABLES,
    Tables,
)
from fusewise.errors import InputError
from fusewise.operation import unfused_path
from fusewise.shape import DType, format_size

FlashInferBackend = Literal["auto", "trtllm", "mnnvl"]

_RELEASE = re.compile(r"v?(\d+)\.(\d+)(?:\.\d+)?(?:[.+-]?[a-z].*|\+.*)?")


@dataclass(frozen=True)
class VllmSettings:
    """One vLLM on one node: all that decides which all-reduce kernel runs at which size.

    Args:
        version: ``"0.33"``, ``"0.33.0"``; only the first two numbers choose the tables.
        sm: compute capability as ``10 * major + minor``: 90 for Hopper.
        world_size: the tensor-parallel size, all on one node.
        multicast: NVLink multicast can be used: without it vLLM's symmetric memory is off.
        dtype: the model's.
        nccl_symm_mem: ``VLLM_USE_NCCL_SYMM_MEM`` (default 0).
        symm_mem: ``VLLM_ALLREDUCE_USE_SYMM_MEM`` (default 1).
        flashinfer_all_reduce: ``VLLM_ALLREDUCE_USE_FLASHINFER``; None for the version's default.
        flashinfer_backend: ``VLLM_FLASHINFER_ALLREDUCE_BACKEND``.
        custom_all_reduce: False with ``--disable-custom-all-reduce``.
        fully_connected: every pair of GPUs has NVLink.

    Raises:
        InputError: the version is not one whose sources were read, or a number is out of range.
    """

    version: str
    sm: int
    world_size: int
    multicast: bool
    dtype: DType = "bfloat16"
    nccl_symm_mem: bool = False
    symm_mem: bool = True
    flashinfer_all_reduce: bool | None = None
    flashinfer_backend: FlashInferBackend = "auto"
    custom_all_reduce: bool = True
    fully_connected: bool = True
    tables: Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.sm < 10:
            raise InputError(
                "vLLM settings out of range",
                expected="world_size >= 1 and sm >= 10",
                got=f"world_size {self.world_size}, sm {self.sm}",
            )
        object.__setattr__(self, "tables", tables_of(self.version))


def tables_of(version: str) -> Tables:
    """The tables of a release, by its first two numbers.

    Raises:
        InputError: no wheel of that release was read; names those that were.
    """
    match = _RELEASE.fullmatch(version.strip())
    minor = f"{match[1]}.{match[2]}" if match else version.strip()
    if match and minor in TABLES:
        return TABLES[minor]
    near = difflib.get_close_matches(minor, TABLES, n=1, cutoff=0.5)
    raise InputError(
        "unknown vLLM version",
        expected=f"one of {', '.join(TABLES)}",
        got=repr(version),
        hint=f"The nearest known one is {near[0]}." if near else None,
    )


def engine_cap(settings: VllmSettings) -> int | None:
    """The largest message vLLM fuses by its own table; None where it does not fuse at all."""
    return settings.tables.fusion_max_bytes.get(settings.sm, {}).get(settings.world_size)


def fused_choice(settings: VllmSettings, message_bytes: int) -> str:
    """The fused kernel vLLM runs: one-shot up to and including its limit, two-shot above.

    With FlashInfer's ``mnnvl`` backend (``fused_backend``) FlashInfer chooses by itself; this
    names what the ``trtllm`` backend runs, which is what profiles hold.
    """
    limits = settings.tables.one_shot_max_bytes.get(settings.sm, {})
    limit = limits.get(settings.world_size)
    one_shot = limit is None or message_bytes <= limit
    return "flashinfer.one_shot" if one_shot else "flashinfer.two_shot"


def fused_backend(settings: VllmSettings) -> Literal["trtllm", "mnnvl"]:
    """Which of FlashInfer's backends this vLLM fuses with on one node."""
    if settings.flashinfer_backend != "auto":
        return settings.flashinfer_backend
    return "mnnvl" if settings.tables.prefers_mnnvl and settings.multicast else "trtllm"


def flashinfer_active(settings: VllmSettings) -> bool:
    """Whether FlashInfer's plain all-reduce is asked at all for unfused messages."""
    if settings.flashinfer_all_reduce is None:
        return settings.tables.flashinfer_default
    return settings.flashinfer_all_reduce


def unfused_choice(settings: VllmSettings, message_bytes: int) -> str:
    """The path that runs today where this vLLM does not fuse: all-reduce, then the norm.

    FlashInfer's plain all-reduce is asked up to the fusion table's size. Its ``mnnvl`` workspace
    may refuse large messages within that; the answer here is the table's.
    """
    limit = max(engine_cap(settings) or 0, _mnnvl_limit(settings))
    return _dispatch(settings, message_bytes, limit)


def displaced_choice(settings: VllmSettings, message_bytes: int) -> str:
    """The path that would run if the fusion table ended below ``message_bytes``.

    This is what a cap is measured against. FlashInfer's plain all-reduce reads the same table,
    so lowering the table takes it away too, except where vLLM holds a separate size for it.
    """
    return _dispatch(settings, message_bytes, _mnnvl_limit(settings))


def _dispatch(settings: VllmSettings, message_bytes: int, flashinfer_limit: int) -> str:
    takes = {
        "nccl_symm": _nccl_symm_takes(settings, message_bytes),
        "flashinfer": flashinfer_active(settings) and message_bytes <= flashinfer_limit,
        "custom": message_bytes % 16 == 0 and message_bytes < custom_limit(settings),
        "symm_mem": symm_mem_active(settings) and message_bytes <= _symm_mem_limit(settings),
        "nccl": True,
    }
    backend = next(name for name in settings.tables.dispatch if takes[name])
    if backend == "symm_mem":
        backend = "multimem" if _multimem(settings) else "symm_mem.two_shot"
    return unfused_path(backend)


def symm_mem_active(settings: VllmSettings) -> bool:
    """Whether torch's symmetric memory is up: switched on, multicast, listed, bf16 only."""
    return (
        settings.symm_mem
        and settings.multicast
        and settings.dtype == "bfloat16"
        and _symm_mem_limit(settings) > 0
    )


def custom_limit(settings: VllmSettings) -> int:
    """The size at which custom all-reduce stops (it takes strictly less); 0 where it is off.

    The table applies only beside symmetric memory, which does not look at the dtype then.
    """
    connected = settings.world_size == 2 or settings.fully_connected
    if not (settings.custom_all_reduce and connected and settings.world_size in CUSTOM_WORLD_SIZES):
        return 0
    if settings.symm_mem and settings.multicast and _symm_mem_limit(settings):
        return _custom_beside_symm_mem(settings)
    return CUSTOM_BUFFER_BYTES


def _custom_beside_symm_mem(settings: VllmSettings) -> int:
    table = settings.tables.custom_max_bytes.get(settings.sm, {})
    return min(table.get(settings.world_size, CUSTOM_BUFFER_BYTES), CUSTOM_BUFFER_BYTES)


def _symm_mem_limit(settings: VllmSettings) -> int:
    return settings.tables.symm_mem_max_bytes.get(settings.sm, {}).get(settings.world_size, 0)


def _multimem(settings: VllmSettings) -> bool:
    return settings.world_size in settings.tables.multimem_world_sizes.get(settings.sm, ())


def _mnnvl_limit(settings: VllmSettings) -> int:
    """The size kept apart from the fusion table for FlashInfer's plain mnnvl all-reduce."""
    sizes = settings.tables.mnnvl_max_bytes or {}
    if fused_backend(settings) != "mnnvl":
        return 0
    return sizes.get((settings.sm, settings.world_size), 0)


def _nccl_symm_takes(settings: VllmSettings, message_bytes: int) -> bool:
    """``should_nccl_symm_mem_allreduce``: outside the open range where custom is preferred."""
    if not settings.nccl_symm_mem:
        return False
    bounds = (settings.tables.nccl_symm_ranges or {}).get(settings.world_size)
    if bounds is None:
        return settings.world_size > settings.tables.nccl_symm_above_world_size
    return message_bytes <= bounds[0] or message_bytes >= bounds[1]


@dataclass(frozen=True)
class RuleCap:
    """The rule's answer. ``lowered`` False: the engine's own cap stands."""

    cap_bytes: int | None
    lowered: bool
    why: str


def rule_cap(settings: VllmSettings) -> RuleCap:
    """min(engine's cap, size at which the active fast all-reduce takes over): issue 44079's rule.

    Fast all-reduces are NCCL symmetric memory, from the upper end of the range in which vLLM
    prefers its custom kernel, and multimem, from the custom kernel's table size. Where neither
    is available the engine's cap stands.
    """
    cap = engine_cap(settings)
    if cap is None:
        return RuleCap(None, False, f"vLLM {settings.tables.read_in} does not fuse here")
    takeovers: list[tuple[int, str]] = []
    bounds = (settings.tables.nccl_symm_ranges or {}).get(settings.world_size)
    if settings.nccl_symm_mem and bounds is not None:
        takeovers.append((bounds[1], "NCCL symmetric memory"))
    if symm_mem_active(settings) and _multimem(settings):
        takeovers.append((_custom_beside_symm_mem(settings), "multimem"))
    if not takeovers:
        return RuleCap(cap, False, "no faster all-reduce takes over below the engine's cap")
    size, name = min(takeovers)
    if size >= cap:
        return RuleCap(cap, False, f"{name} takes over at {format_size(size)}, not below the cap")
    return RuleCap(size, True, f"{name} takes over at {format_size(size)}")


def field_mb(cap_bytes: int) -> float:
    """A cap as ``fi_allreduce_fusion_max_size_mb`` takes it: binary MB, exact for any bytes."""
    return cap_bytes / FIELD_UNIT_BYTES


def vllm_flag(cap_bytes: int) -> str:
    """What to paste behind ``vllm serve MODEL`` to set the cap by hand.

    A cap of 0 turns the fusion off: as a size, vLLM would make it a compile range of no tokens.
    """
    field_text = f'{{"fi_allreduce_fusion_max_size_mb": {field_mb(cap_bytes)!r}}}'
    if cap_bytes == 0:
        field_text = '{"fuse_allreduce_rms": false}'
    return f"--compilation-config '{{\"pass_config\": {field_text}}}'"


def vllm_environment(settings: VllmSettings, cap_bytes: int) -> str | None:
    """The environment variable the flag needs beside it, or None.

    FlashInfer's plain all-reduce reads the table, not the field: where it is on, it would take
    the messages that the flag sends away from the fused kernel.
    """
    cap = engine_cap(settings)
    if flashinfer_active(settings) and cap is not None and cap_bytes < cap:
        return "VLLM_ALLREDUCE_USE_FLASHINFER=0"
    return None
