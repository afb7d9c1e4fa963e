"""SGLang's own all-reduce tables, per release, as its wheels' sources print them. Data only.

Read in the wheels named in ``Tables.read_in``, under ``sglang/srt/``:

- ``max_tokens``: ``FUSE_ALLREDUCE_MAX_BATCH_SIZE``, ``layers/layer_boundary/residual/add_norm.py``,
  whatever the hidden size, the world size and the node.
- ``custom``: ``_sm90_configs``, ``_sm100_configs`` and ``_sm107_configs`` in
  ``distributed/device_communicators/configs/custom_all_reduce_v2.py``: which of SGLang's own
  kernels runs up to which size; ``custom_max_bytes``: the default of
  ``SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB`` in ``environ.py``, which ends them all.
- ``legacy_max_bytes``, ``legacy_world_sizes``: ``_MAX_CAR_SIZE`` and ``_SUPPORTED_WORLD_SIZES`` of
  ``CustomAllreduce`` in ``custom_all_reduce.py``: vLLM's kernel, where the other cannot run.
- ``symm_mem_max_bytes``: ``TORCH_SYMM_MEM_ALL_REDUCE_MAX_SIZES`` in ``all_reduce_utils.py``, by
  major capability; ``multimem_world_sizes``: ``_WORLD_SIZES_MULTIMEM`` in ``torch_symm_mem.py``.
- ``one_shot_max_bytes``: FlashInfer's own choice, because SGLang leaves ``use_oneshot`` open:
  ``_use_oneshot_heuristics`` in ``flashinfer/comm/trtllm_ar.py`` (0.7.2, which 0.5.23 pins; the
  same in 0.6.14), MB of 2 · world size · message.

``custom`` is keyed by the capability as ``10 * major + minor``, then by world size. What follows
from the tables is ``dispatch.py``'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fusewise.engines.releases import Releases

_MIB = 2**20

# FlashInfer's fused kernels take these world sizes (flashinfer.comm.trtllm_ar).
WORLD_SIZES = (2, 4, 8, 16)


@dataclass(frozen=True)
class Ends:
    """The largest message of each of SGLang's own kernels, bytes, asked in this order.

    ``multimem``: from and to, both inclusive, and only with multicast. A plane of the pull kernels
    holds ``custom_max_bytes``; so does a slot of the push kernels.
    """

    one_shot_push: int
    one_shot_pull: int
    two_shot_pull: int
    multimem: tuple[int, int] | None = None
    two_shot_push: int = 0


@dataclass(frozen=True)
class Custom:
    """One world size's kernels: as captured in CUDA graphs (decode), and eager (prefill)."""

    graph: Ends
    eager: Ends


@dataclass(frozen=True)
class Tables:
    """The tables of one release. Sizes in bytes."""

    read_in: str
    max_tokens: int
    custom: Mapping[int, Mapping[int, Custom]]
    custom_max_bytes: int
    legacy_max_bytes: int
    legacy_world_sizes: tuple[int, ...]
    symm_mem_max_bytes: Mapping[int, Mapping[int, int]]
    multimem_world_sizes: Mapping[int, tuple[int, ...]]
    one_shot_max_bytes: Mapping[int, int]


def _ends(*mb: float, mc: tuple[float, float] | None = None, two_push: float = 0) -> Ends:
    """A row as SGLang writes it, in binary megabytes: one-shot push, one-shot pull, two-shot."""
    push, pull, two_shot = (int(size * _MIB) for size in mb)
    multimem = (int(mc[0] * _MIB), int(mc[1] * _MIB)) if mc else None
    return Ends(push, pull, two_shot, multimem, int(two_push * _MIB))


_SM90 = {
    2: Custom(_ends(16, 128, 128), _ends(32, 128, 128)),
    4: Custom(_ends(0.375, 0.375, 128), _ends(0.875, 0.875, 32, mc=(0, 32))),
    8: Custom(_ends(0.125, 0.125, 32, mc=(0.5, 128)), _ends(0.125, 0.125, 128, mc=(0, 128))),
}
_SM100_BEFORE_TWO_SHOT_PUSH = {
    2: Custom(_ends(8, 32, 128), _ends(16, 128, 128)),
    4: Custom(_ends(2.25, 2.25, 128), _ends(3, 3, 32)),
    8: Custom(_ends(0.5, 0.5, 128, mc=(8, 128)), _ends(0.75, 0.75, 128, mc=(0, 128))),
    16: Custom(*[_ends(0.25, 0.25, 128, mc=(0.25, 128))] * 2),
}
_SM100 = _SM100_BEFORE_TWO_SHOT_PUSH | {
    4: Custom(_ends(0.625, 0.625, 128, two_push=8), _ends(0.625, 0.625, 32, two_push=8)),
    8: Custom(
        _ends(0.25, 0.25, 128, mc=(8, 128), two_push=8),
        _ends(0.25, 0.25, 128, mc=(0, 128), two_push=8),
    ),
}
_SM107 = {
    2: Custom(*[_ends(128, 128, 128)] * 2),
    4: Custom(_ends(6.938, 6.938, 128), _ends(9.812, 9.812, 128, mc=(9.812, 128))),
    8: Custom(*[_ends(2.438, 2.438, 128, mc=(2.438, 128))] * 2),
    16: Custom(*[_ends(0.8125, 0.8125, 128, mc=(0.8125, 128))] * 2),
}
_SYMM_MEM = {2: 64 * _MIB, 4: 64 * _MIB, 6: 128 * _MIB, 8: 128 * _MIB}

_V0_5_22 = Tables(
    read_in="0.5.22",
    max_tokens=2048,
    custom={
        90: _SM90,
        100: _SM100_BEFORE_TWO_SHOT_PUSH,
        103: _SM100_BEFORE_TWO_SHOT_PUSH,
        107: _SM107,
    },
    custom_max_bytes=16 * _MIB,
    legacy_max_bytes=8 * _MIB,
    legacy_world_sizes=(2, 4, 6, 8),
    symm_mem_max_bytes={9: _SYMM_MEM, 10: _SYMM_MEM},
    multimem_world_sizes={9: (4, 6, 8), 10: (4, 6, 8)},
    one_shot_max_bytes={n: mb * _MIB // (2 * n) for n, mb in ((2, 512), (4, 64), (8, 42))},
)

TABLES: Mapping[str, Tables] = {
    "0.5.22": _V0_5_22,
    "0.5.23": replace(
        _V0_5_22,
        read_in="0.5.23",
        custom={90: _SM90, 100: _SM100, 103: _SM100, 107: _SM107},
    ),
}

_RELEASES = Releases("SGLang", 3, TABLES)
tables_of, known_version = _RELEASES.tables_of, _RELEASES.known_version
