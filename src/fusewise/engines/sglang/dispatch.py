"""What SGLang does by itself at each message size, and the rule that caps its fusion. Pure.

SGLang fuses up to a number of tokens (``flashinfer_ar_fusion_applies``), whatever they weigh:
28 MiB at hidden size 7168. Where it does not, ``GroupCoordinator.all_reduce`` asks, in this order:
NCCL's symmetric memory (only if the custom kernels decline), FlashInfer's plain all-reduce (as far
as the fusion's workspace reaches), the custom kernels, FlashInfer's for PCIe, torch's symmetric
memory, NCCL. The numbers are ``tables.py``'s; nothing here probes a node.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fusewise.engines.base import EngineSettings, RuleCap, Threshold
from fusewise.engines.sglang.tables import Custom, Tables, tables_of
from fusewise.operation import unfused_path
from fusewise.shape import format_size

MNNVL = "flashinfer.mnnvl"
FlashInferBackend = Literal["auto", "trtllm", "mnnvl"]
_OWN = "sglang."  # SGLang's own kernels: one_shot_push, two_shot_push, ... , multimem
_ALIGNMENT = 16  # bytes: what its custom kernels take multiples of


@dataclass(frozen=True)
class SGLangSettings(EngineSettings):
    """One SGLang on one node: all that decides which all-reduce kernel runs at which size.

    Sizes of SGLang's own kernels are those inside CUDA graphs, where decode runs; eager calls
    change from kernel to kernel at other sizes (``tables.Custom``).

    Args:
        version, sm, world_size, multicast, dtype: as in the base.
        fuses: False with ``--enforce-disable-flashinfer-allreduce-fusion``, with deterministic
            inference, and for models for which nobody switched it on.
        flashinfer_backend: ``--flashinfer-allreduce-fusion-backend``.
        custom_all_reduce: False with ``--disable-custom-all-reduce``.
        custom_v2: ``SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2``; without it vLLM's kernel.
        custom_max_bytes: ``SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB``; None for the default.
        symm_mem: ``--enable-torch-symm-mem``.
        nccl_symm_mem: ``--enable-symm-mem``.
        pcie_ipc: ``SGLANG_ENABLE_PCIE_IPC_ALLREDUCE``.
        fully_connected: every pair of GPUs has NVLink.

    Raises:
        InputError: the version is not one whose sources were read.
    """

    only_lowered: ClassVar[bool] = True

    fuses: bool = True
    flashinfer_backend: FlashInferBackend = "auto"
    custom_all_reduce: bool = True
    custom_v2: bool = True
    custom_max_bytes: int | None = None
    symm_mem: bool = False
    nccl_symm_mem: bool = False
    pcie_ipc: bool = False
    fully_connected: bool = True
    tables: Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", tables_of(self.version))

    @property
    def threshold(self) -> Threshold | None:
        """A number of tokens on Hopper and on data-centre Blackwell; None elsewhere."""
        return Threshold(num_tokens=self.tables.max_tokens) if self._can_fuse else None

    @property
    def _can_fuse(self) -> bool:
        return self.fuses and self.sm // 10 in (9, 10) and self.world_size > 1

    @property
    def fused_backend(self) -> Literal["trtllm", "mnnvl"]:
        """Which of FlashInfer's backends it fuses with (``_resolve_backend``)."""
        if self.flashinfer_backend != "auto":
            return self.flashinfer_backend
        return "mnnvl" if self.sm // 10 == 10 else "trtllm"

    def fused_choice(self, message_bytes: int, hidden_size: int = 0) -> str:
        """The fused kernel. Which shot is FlashInfer's choice, as SGLang leaves it open."""
        if self.fused_backend == "mnnvl":
            return MNNVL
        one_shot = message_bytes <= self.tables.one_shot_max_bytes.get(self.world_size, 0)
        return "flashinfer.one_shot" if one_shot else "flashinfer.two_shot"

    def unfused_choice(self, message_bytes: int, hidden_size: int) -> str:
        """The path that runs today where it does not fuse: FlashInfer's plain one goes first."""
        return self._dispatch(message_bytes, self.cap_bytes(hidden_size) or 0)

    def displaced_choice(self, message_bytes: int, hidden_size: int = 0) -> str:
        """The path below a lowered cap: the plugin bounds FlashInfer's plain all-reduce too."""
        return self._dispatch(message_bytes, 0)

    def _dispatch(self, message_bytes: int, flashinfer_limit: int) -> str:
        custom = self._custom(message_bytes)
        symm_mem = self._symm_mem
        takes = {
            "nccl_symm": self.nccl_symm_mem and custom is None,
            "flashinfer": message_bytes <= flashinfer_limit,
            str(custom): custom is not None,
            "flashinfer_pcie_ipc": self.pcie_ipc and self.dtype == "bfloat16",
            str(symm_mem): symm_mem is not None and message_bytes < self._symm_mem_limit,
            "nccl": True,
        }
        return unfused_path(next(name for name, taken in takes.items() if taken))

    def _custom(self, message_bytes: int) -> str | None:
        """The kernel of ``ca_comm`` that takes a message (``_pick_config``), or None."""
        if message_bytes % _ALIGNMENT:
            return None
        known = self._own_kernels
        if known is None:
            taken = self._legacy_runs and message_bytes <= self.tables.legacy_max_bytes
            return "custom" if taken else None
        most, ends = self.own_max_bytes, known.graph
        low, high = (ends.multimem if self.multicast else None) or (1, 0)
        kernels = {
            "one_shot_push": message_bytes <= min(ends.one_shot_push, most),
            # A slot of the push plane holds two halves of every rank's share.
            "two_shot_push": message_bytes <= min(ends.two_shot_push, most * self.world_size // 2),
            "one_shot_pull": message_bytes <= min(ends.one_shot_pull, most),
            "multimem": min(low, most) <= message_bytes <= min(high, most),
            "two_shot_pull": message_bytes <= min(ends.two_shot_pull, most),
        }
        return next((_OWN + name for name, taken in kernels.items() if taken), None)

    @property
    def _own_kernels(self) -> Custom | None:
        """SGLang's own kernels here (``can_use_custom_all_reduce_v2``); None: vLLM's run."""
        if not (self.custom_all_reduce and self.custom_v2 and self.fully_connected):
            return None
        return self.tables.custom.get(self.sm, {}).get(self.world_size)

    @property
    def own_max_bytes(self) -> int:
        """The largest message of SGLang's own kernels; 0 where they do not run."""
        if self._own_kernels is None:
            return 0
        asked = self.custom_max_bytes
        return self.tables.custom_max_bytes if asked is None else asked

    @property
    def _legacy_runs(self) -> bool:
        connected = self.world_size == 2 or self.fully_connected
        listed = self.world_size in self.tables.legacy_world_sizes
        return self.custom_all_reduce and connected and listed

    @property
    def _symm_mem(self) -> str | None:
        """torch's symmetric memory: on request, bf16, and only with multicast."""
        if not (self.symm_mem and self.multicast and self.dtype == "bfloat16"):
            return None
        multimem = self.world_size in self.tables.multimem_world_sizes.get(self.sm // 10, ())
        return "multimem" if multimem else "symm_mem.two_shot"

    @property
    def _symm_mem_limit(self) -> int:
        return self.tables.symm_mem_max_bytes.get(self.sm // 10, {}).get(self.world_size, 0)

    def rule(self, hidden_size: int | None = None) -> RuleCap:
        """min(its threshold, size at which the active fast all-reduce takes over): 44079's rule.

        Fast all-reduces are SGLang's own multicast kernel, from where its table prefers it both in
        graphs and outside, and those behind the custom kernels, from where these end.
        """
        cap = self.cap_bytes(hidden_size)
        if cap is None:
            return RuleCap(None, False, f"SGLang {self.version} does not fuse here")
        if self.fused_backend == "mnnvl":
            return RuleCap(
                cap, False, "it fuses with FlashInfer's mnnvl, not measured on this node"
            )
        sizes = self._takeovers()
        if not sizes:
            return RuleCap(cap, False, "no faster all-reduce takes over below the engine's cap")
        size, name = min(sizes)
        takes = f"{name} takes over at {format_size(size)}"
        if size >= cap:
            return RuleCap(cap, False, f"{takes}, not below the cap")
        return RuleCap(size, True, takes)

    def _takeovers(self) -> list[tuple[int, str]]:
        found = []
        own = self._own_kernels
        if own is not None and self.multicast and own.graph.multimem and own.eager.multimem:
            start = max(own.graph.multimem[0], own.eager.multimem[0])
            if self._custom(start + _ALIGNMENT) == f"{_OWN}multimem":
                found.append((start, "SGLang's own multimem kernel"))
        end = self.own_max_bytes or (self.tables.legacy_max_bytes if self._legacy_runs else 0)
        behind = self.displaced_choice(end + _ALIGNMENT)
        names = {"multimem": "multimem", "nccl_symm": "NCCL symmetric memory"}
        fast = [(end, name) for key, name in names.items() if behind == unfused_path(key)]
        found += fast if end else []
        return found

    def flag(self, cap_bytes: int) -> str | None:
        """SGLang's fusion is on or off: it has no option for a size between."""
        return None if cap_bytes else "--enforce-disable-flashinfer-allreduce-fusion"

    def environment(self, cap_bytes: int) -> str | None:
        """What holds the plugin to this cap, where it is one that the plugin would set."""
        own = self.cap_bytes()
        return f"FUSEWISE_CAP={cap_bytes}" if own is not None and 0 < cap_bytes < own else None

    def notes(self, measured: Collection[str] = ()) -> list[str]:
        """About the plugin, FlashInfer's backend, and kernels that were not measured."""
        notes = [
            "SGLang counts tokens and has no option for a cap: its plugin here bounds the fusion, "
            "and FlashInfer's plain all-reduce, which is asked before SGLang's own. Without the "
            "plugin there is --enforce-disable-flashinfer-allreduce-fusion."
        ]
        if self.fused_backend == "mnnvl" and MNNVL not in measured:
            notes.append(
                f"SGLang {self.version} fuses with FlashInfer's mnnvl here. This profile holds no "
                "times of it, and trtllm's do not decide about it: the cap stays. "
                "--flashinfer-allreduce-fusion-backend trtllm selects the other."
            )
        if self.own_max_bytes and not any(path.startswith(_OWN) for path in measured):
            notes.append(
                f"Up to {format_size(self.own_max_bytes)} the alternative is a kernel of SGLang's "
                "own, of which this profile holds no times: there the rule decides. "
                "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2=0 (here: --no-custom-v2) selects vLLM's "
                "custom all-reduce."
            )
        return notes
