"""What an engine is: what it does by itself on a node, and what to paste to change that. Pure.

``EngineSettings`` is one engine of one version on one node, with its answers; ``Engine`` is how to
come by it. ``cap``, ``audit``, ``explain`` and ``decode`` ask these two and know no engine by name.
Nothing here reads a file, an environment or a GPU.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fusewise.node import Fingerprint
from fusewise.shape import ELEMENT_BYTES, DType, format_size, tokens_at

# What a token threshold is shown at where nobody names a hidden size; the smallest of them stands
# for all where one number is wanted.
HIDDEN_SIZES = (2048, 4096, 7168)


FlagValue = bool | str


@dataclass(frozen=True)
class Threshold:
    """The largest message an engine fuses: by size, by number of tokens, or by both at once."""

    message_bytes: int | None = None
    num_tokens: int | None = None

    def bytes_at(self, hidden_size: int, dtype: DType) -> int:
        """The largest fused message at a hidden size, in bytes."""
        row_bytes = hidden_size * ELEMENT_BYTES[dtype]
        of_tokens = None if self.num_tokens is None else self.num_tokens * row_bytes
        return min(limit for limit in (self.message_bytes, of_tokens) if limit is not None)

    def __str__(self) -> str:
        size, tokens = self.message_bytes, self.num_tokens
        words = [] if size is None else [f"{size} ({format_size(size)})"]
        return " and ".join([*words, *([] if tokens is None else [f"{tokens} tokens"])])


@dataclass(frozen=True)
class RuleCap:
    """The rule's answer, bytes. ``lowered`` False: the engine's own cap stands. None: no fusion."""

    cap_bytes: int | None
    lowered: bool
    why: str


@dataclass(frozen=True)
class Flag:
    """One option of an engine's own on our command line: on, off, or not given; or one of few.

    Args:
        name: its key in the flags that ``Engine.settings`` receives.
        declaration: as typer takes it: ``--symm-mem/--no-symm-mem``.
        help: one line.
        values: what it takes; none for a switch.
    """

    name: str
    declaration: str
    help: str
    values: tuple[str, ...] = ()


# Options of more than one engine: of one name there can be but one declaration.
NCCL_SYMM_MEM = Flag(
    "nccl_symm_mem",
    "--nccl-symm-mem",
    "As with VLLM_USE_NCCL_SYMM_MEM=1, or SGLang's --enable-symm-mem.",
)
SYMM_MEM = Flag(
    "symm_mem",
    "--symm-mem/--no-symm-mem",
    "As with VLLM_ALLREDUCE_USE_SYMM_MEM=1 or 0, or SGLang's --enable-torch-symm-mem.",
)
FLASHINFER_BACKEND = Flag(
    "flashinfer_backend",
    "--flashinfer-backend",
    "As with VLLM_FLASHINFER_ALLREDUCE_BACKEND, or SGLang's --flashinfer-allreduce-fusion-backend:"
    " trtllm or mnnvl.",
    ("auto", "trtllm", "mnnvl"),
)


@dataclass(frozen=True)
class EngineSettings(ABC):
    """One engine on one node: all that decides which kernel runs at which message.

    Paths are named as in profiles. A message is its bytes and its hidden size: some engines count
    tokens.

    Args:
        version: as its distribution calls itself.
        sm: compute capability as ``10 * major + minor``: 90 for Hopper.
        world_size: the tensor-parallel size, all on one node.
        multicast: NVLink multicast can be used.
        dtype: the model's.

    Attributes:
        only_lowered: nothing can make it fuse beyond its own threshold.
    """

    only_lowered: ClassVar[bool] = False

    version: str
    sm: int
    world_size: int
    multicast: bool
    dtype: DType = "bfloat16"

    @property
    @abstractmethod
    def threshold(self) -> Threshold | None:
        """Up to where it fuses by itself; None where it does not fuse at all."""

    @property
    def counts_tokens(self) -> bool:
        """Whether its threshold weighs more at a larger hidden size."""
        return self.threshold is not None and self.threshold.num_tokens is not None

    def cap_bytes(self, hidden_size: int | None = None) -> int | None:
        """``threshold`` in bytes; without a hidden size, that of the smallest usual one."""
        known = self.threshold
        return known.bytes_at(hidden_size or min(HIDDEN_SIZES), self.dtype) if known else None

    @abstractmethod
    def fused_choice(self, message_bytes: int, hidden_size: int) -> str:
        """The kernel that runs where it fuses."""

    @abstractmethod
    def unfused_choice(self, message_bytes: int, hidden_size: int) -> str:
        """The path that runs today where it does not fuse: an all-reduce, then the norm."""

    def today(self, message_bytes: int, hidden_size: int) -> str:
        """The path that runs without a cap of ours."""
        fuses = message_bytes <= (self.cap_bytes(hidden_size) or 0)
        choice = self.fused_choice if fuses else self.unfused_choice
        return choice(message_bytes, hidden_size)

    @abstractmethod
    def displaced_choice(self, message_bytes: int, hidden_size: int) -> str:
        """The path that would run if a cap ended below this message: what a cap is judged by."""

    @abstractmethod
    def rule(self, hidden_size: int | None = None) -> RuleCap:
        """The cap without a measurement."""

    @abstractmethod
    def flag(self, cap_bytes: int) -> str | None:
        """What to add to the engine's command line to set the cap by hand; None: it has none."""

    @abstractmethod
    def environment(self, cap_bytes: int) -> str | None:
        """The environment variable needed beside the flag, or None."""

    @abstractmethod
    def notes(self, measured: Collection[str] = ()) -> list[str]:
        """What a reader of its audit must know beside the numbers, one sentence or two each.

        ``measured``: the names of the profile's paths.
        """

    def max_tokens(self, cap_bytes: int, hidden_size: int) -> int:
        """The largest number of tokens within a cap."""
        return tokens_at(cap_bytes, hidden_size, self.dtype)


@dataclass(frozen=True)
class Engine:
    """How to come by an engine's settings.

    Args:
        name: as on the command line; ``FUSEWISE_<NAME>`` switches its plugin.
        distribution: the package whose version is the engine's.
        versions: releases whose sources were read, oldest first.
        settings: (version, node, dtype, environment, flags) → settings. Flags win over the
            environment, which is read under the engine's own names and defaults. Raises
            InputError for a version or value it does not know, UnavailableError for a node on
            which the engine does not fuse.
        flags: options of its own.
        stand_in: the version whose tables stand for one that was not read, and what to say then.
            Raises InputError for one that is too old, or none.
    """

    name: str
    distribution: str
    versions: tuple[str, ...]
    settings: Callable[
        [str, Fingerprint, DType, Mapping[str, str], Mapping[str, FlagValue]], EngineSettings
    ]
    flags: tuple[Flag, ...] = ()
    stand_in: Callable[[str], tuple[str, str | None]] = lambda version: (version, None)

    def version(self) -> str:
        """The installed version, else the newest that was read."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return self.versions[-1]
