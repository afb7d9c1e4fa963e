"""vLLM's own all-reduce tables, per release, as its wheels' sources print them. Data only.

Read in the wheels named in ``Tables.read_in``, under ``vllm/``:

- ``fusion_max_bytes``: ``FI_ALLREDUCE_FUSION_MAX_SIZE_MB`` in
  ``compilation/passes/fusion/allreduce_rms_fusion.py``; ``one_shot_max_bytes``:
  ``_FI_ALLREDUCE_ONE_SHOT_MAX_SIZES_MB`` there.
- ``custom_max_bytes``, ``symm_mem_max_bytes``, ``nccl_symm_ranges``, ``mnnvl_max_bytes``:
  ``CUSTOM_ALL_REDUCE_MAX_SIZES``, ``SYMM_MEM_ALL_REDUCE_MAX_SIZES``,
  ``NCCL_SYMM_MEM_ALL_REDUCE_CONFIG`` and ``FI_MNNVL_ALLREDUCE_MAX_SIZE_MB`` (one node) in
  ``distributed/device_communicators/all_reduce_utils.py``.
- ``multimem_world_sizes``: ``SymmMemCommunicator._WORLD_SIZES_MULTIMEM`` in ``symm_mem.py``.
- ``dispatch``: the order of questions in ``CudaCommunicator.all_reduce``, CUDA only.
- ``flashinfer_default``: ``VLLM_ALLREDUCE_USE_FLASHINFER`` in ``envs.py``.
- ``prefers_mnnvl``: ``_resolve_fi_ar_backend`` in ``flashinfer_all_reduce.py`` tries FlashInfer's
  ``mnnvl`` backend first on one node, and ``trtllm`` where there is no multicast.
- ``invariant_is_plain``: ``VLLM_BATCH_INVARIANT`` turns off the fusion
  (``enable_allreduce_rms_fusion``) and FlashInfer's plain all-reduce (``CudaCommunicator``).
- ``hand_fused``: ``model_executor/layers/fused_allreduce_gemma_rms_norm.py``, which reads the table
  whatever the compilation config says.
- ``has_pcie_ipc``: ``VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC`` in ``envs.py``.

Keys are the capability as ``10 * major + minor``, then the world size. What follows from the
tables is ``dispatch.py``'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fusewise.engines.releases import Releases

_KIB, _MIB = 2**10, 2**20

BySize = Mapping[int, int]
BySm = Mapping[int, BySize]


@dataclass(frozen=True)
class Tables:
    """The tables of one release. Sizes in bytes."""

    read_in: str
    fusion_max_bytes: BySm
    one_shot_max_bytes: BySm
    custom_max_bytes: BySm
    symm_mem_max_bytes: BySm
    multimem_world_sizes: Mapping[int, tuple[int, ...]]
    dispatch: tuple[str, ...]
    flashinfer_default: bool = False
    prefers_mnnvl: bool = False
    invariant_is_plain: bool = False
    hand_fused: bool = False
    has_pcie_ipc: bool = False
    mnnvl_max_bytes: Mapping[tuple[int, int], int] | None = None
    nccl_symm_ranges: Mapping[int, tuple[int, int]] | None = None
    nccl_symm_above_world_size: int = 8


def _mb(**rows: dict[int, float]) -> BySm:
    """``sm90={2: 64}`` in binary megabytes, as vLLM writes them, to bytes by capability."""
    return {
        int(name.removeprefix("sm")): {size: int(mb * _MIB) for size, mb in row.items()}
        for name, row in rows.items()
    }


_NCCL_SYMM_FIRST = ("nccl_symm", "flashinfer", "custom", "symm_mem", "nccl")
_FLASHINFER_FIRST = ("flashinfer", "nccl_symm", "custom", "symm_mem", "nccl")

_V0_20 = Tables(
    read_in="0.20.0",
    fusion_max_bytes=_mb(
        sm90={2: 64, 4: 2, 8: 0.5}, sm100={2: 64, 4: 32, 8: 1}, sm103={2: 64, 4: 64, 8: 2}
    ),
    one_shot_max_bytes=_mb(
        sm90={2: 32, 4: 2, 8: 0.5}, sm100={2: 32, 4: 4, 8: 1}, sm103={2: 32, 4: 4, 8: 2}
    ),
    custom_max_bytes=_mb(
        sm90={2: 64, 4: 32, 6: 0.5, 8: 0.25},
        sm100={2: 2, 4: 2, 6: 1, 8: 1},
        sm103={2: 4, 4: 4, 6: 8, 8: 4},
    ),
    symm_mem_max_bytes=_mb(
        sm90={2: 64, 4: 32, 6: 64, 8: 64},
        sm100={2: 8, 4: 32, 6: 128, 8: 128},
        sm103={2: 4, 4: 32, 6: 32, 8: 64},
    ),
    multimem_world_sizes={90: (4, 6, 8), 100: (6, 8), 103: (6, 8)},
    dispatch=_NCCL_SYMM_FIRST,
    nccl_symm_ranges={4: (16 * _KIB, 512 * _KIB), 8: (16 * _KIB, 128 * _KIB)},
)

_V0_24 = replace(_V0_20, read_in="0.24.0", hand_fused=True)

_V0_25 = replace(
    _V0_24,
    read_in="0.25.0",
    fusion_max_bytes=_mb(
        sm90={2: 64, 4: 2, 8: 0.5},
        sm100={2: 64, 4: 32, 8: 1, 16: 64},
        sm103={2: 64, 4: 64, 8: 2, 16: 64},
    ),
    prefers_mnnvl=True,
)

_V0_27 = replace(
    _V0_25,
    read_in="0.27.0",
    fusion_max_bytes={**_V0_25.fusion_max_bytes, **_mb(sm107={2: 64, 4: 64, 8: 2})},
    one_shot_max_bytes={**_V0_25.one_shot_max_bytes, **_mb(sm107={2: 32, 4: 4, 8: 2})},
    custom_max_bytes={**_V0_25.custom_max_bytes, **_mb(sm107={2: 4, 4: 4, 6: 8, 8: 4})},
    symm_mem_max_bytes={**_V0_25.symm_mem_max_bytes, **_mb(sm107={2: 4, 4: 32, 6: 32, 8: 64})},
    multimem_world_sizes={**_V0_25.multimem_world_sizes, 107: (6, 8)},
)

_V0_29 = replace(
    _V0_27,
    read_in="0.29.0",
    fusion_max_bytes={**_V0_27.fusion_max_bytes, **_mb(sm103={2: 64, 4: 64, 8: 4, 16: 64})},
    dispatch=_FLASHINFER_FIRST,
    flashinfer_default=True,
    invariant_is_plain=True,
    mnnvl_max_bytes={(103, 4): 80 * _MIB, (103, 8): 64 * _MIB},
)

_V0_30 = replace(_V0_29, read_in="0.30.0", has_pcie_ipc=True)

_V0_33 = replace(
    _V0_30,
    read_in="0.33.0",
    mnnvl_max_bytes={(100, 8): 128 * _MIB, (103, 4): 80 * _MIB, (103, 8): 128 * _MIB},
)

TABLES: Mapping[str, Tables] = {
    "0.20": _V0_20,
    "0.21": replace(_V0_20, read_in="0.21.0"),
    "0.22": replace(_V0_20, read_in="0.22.1"),
    "0.23": replace(_V0_20, read_in="0.23.0"),
    "0.24": _V0_24,
    "0.25": _V0_25,
    "0.26": replace(_V0_25, read_in="0.26.0"),
    "0.27": _V0_27,
    "0.28": replace(_V0_27, read_in="0.28.0"),
    "0.29": _V0_29,
    "0.30": _V0_30,
    "0.31": replace(_V0_30, read_in="0.31.0"),
    "0.32": replace(_V0_30, read_in="0.32.0"),
    "0.33": _V0_33,
}

# Every release since 0.20 (CustomAllreduce in custom_all_reduce.py): the buffer's default size,
# an upper end whatever the table says, and the world sizes whose all-reduce it takes.
CUSTOM_BUFFER_BYTES = 8 * _MIB
CUSTOM_WORLD_SIZES = (2, 4, 6, 8)
# PassConfig.flashinfer_max_size, config/compilation.py: int(field_mb * 1024 * 1024).
FIELD_UNIT_BYTES = _MIB

_RELEASES = Releases("vLLM", 2, TABLES)
tables_of, known_version = _RELEASES.tables_of, _RELEASES.known_version
