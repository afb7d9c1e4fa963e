"""Where the ranks of a group run, decided once: their devices and their process group.

Three kinds of place: a GPU per rank, GPUs that several ranks share, and CPUs. Everything that
differs between them is a field here. Imports no torch, starts nothing and measures nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fusewise.errors import InputError, UnavailableError
from fusewise.node import Kind, gpu_count, gpu_free_bytes

# torch's own switch for ranks that share a GPU, read at the first symmetric allocation.
SHARED_SWITCH = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
# CPU ranks that may share cores: enough to try what eight GPUs run. Each is a process with torch.
_CPU_RANKS = 8
# The kernels' phases are written for groups up to here (native.two_shot, flashinfer, custom).
_SHARED_RANKS = 8
# A CUDA context with torch's and FlashInfer's kernels, and the workspaces of one verification.
_RANK_BYTES = 2 * 2**30
_SHARE = (
    "Ranks that share a GPU take turns on it, so their times mean nothing; `fusewise verify` "
    "checks results that way."
)


@dataclass(frozen=True)
class Place:
    """What follows from where ranks run.

    Attributes:
        kind: as in the registry's tables and ``Fingerprint.kind``.
        device_type: torch's.
        process_group: torch.distributed's backend. NCCL refuses two ranks on one GPU.
    """

    kind: Kind
    device_type: str
    process_group: str

    @property
    def shared(self) -> bool:
        """Whether several ranks take turns on one GPU."""
        return self.kind == "shared"

    def device(self, local_rank: int) -> str:
        """torch's name of the device of a host's n-th rank."""
        if self.device_type == "cpu":
            return "cpu"
        return f"cuda:{local_rank % max(1, gpu_count())}" if self.shared else f"cuda:{local_rank}"

    @property
    def environment(self) -> dict[str, str]:
        """What a rank's process needs to be told before it starts."""
        return {SHARED_SWITCH: "1"} if self.shared else {}


PLACES: dict[Kind, Place] = {
    "cuda": Place("cuda", "cuda", "nccl"),
    "shared": Place("shared", "cuda", "gloo"),
    "cpu": Place("cpu", "cpu", "gloo"),
}


def default_ranks() -> int:
    """How many ranks where nobody says: one per GPU; two where that makes no group."""
    return max(2, gpu_count())


def default_place(*, share: bool = False) -> Place:
    """Where that many run.

    Raises:
        UnavailableError: this node has one GPU, and what is asked for needs two.
    """
    if gpu_count() == 1 and not share:
        raise UnavailableError("an all-reduce needs two ranks; this node has one GPU", hint=_SHARE)
    return place_for(default_ranks(), share=share)


def place_for(ranks: int, *, share: bool = False) -> Place:
    """Where this host runs so many ranks.

    Args:
        ranks: of this host.
        share: whether several may have one GPU; only for what takes no time.

    Raises:
        InputError: fewer than one rank, or more than this host runs.
        UnavailableError: more ranks than the shared GPUs' memory holds.
    """
    gpus = gpu_count()
    most = gpus or max(_CPU_RANKS, os.cpu_count() or 1)
    if share and gpus:
        most = max(_SHARED_RANKS, gpus)
    if not 1 <= ranks <= most:
        raise InputError(
            "cannot start that many ranks",
            expected=f"1 to {most} {_words(gpus, share)}",
            got=str(ranks),
            hint=_SHARE if gpus and not share else None,
        )
    if not gpus:
        return PLACES["cpu"]
    if ranks <= gpus:
        return PLACES["cuda"]
    _check_room(ranks, gpus)
    return PLACES["shared"]


def _words(gpus: int, share: bool) -> str:
    if not gpus:
        return "CPU ranks"
    return "ranks, sharing GPUs" if share else "ranks, one per GPU"


def _check_room(ranks: int, gpus: int) -> None:
    free, needed = gpu_free_bytes(), -(-ranks // gpus) * _RANK_BYTES
    if free is not None and free < needed:
        raise UnavailableError(
            f"the GPU has too little free memory for {-(-ranks // gpus)} ranks",
            expected=f"{needed / 2**30:.0f} GiB",
            got=f"{free / 2**30:.1f} GiB",
            hint="End what else runs there, or pass fewer --ranks.",
        )


def shares_gpus() -> bool:
    """Whether torch was told that ranks of this process's group share GPUs."""
    return os.environ.get(SHARED_SWITCH, "0") not in ("", "0")


def sharing(devices: Iterable[str | None]) -> list[str]:
    """The devices that more than one rank named; None stands for a CPU."""
    named = [device for device in devices if device is not None]
    return sorted({device for device in named if named.count(device) > 1})


def check_interface(environ: Mapping[str, str] = os.environ) -> None:
    """Whether gloo, which has no words for it, finds the network interfaces it is told to use.

    Raises:
        UnavailableError: ``GLOO_SOCKET_IFNAME`` names one that this machine does not have.
    """
    here = {name for _, name in socket.if_nameindex()}
    asked = environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    unknown = [name for name in asked if name and name not in here]
    if unknown:
        raise UnavailableError(
            "GLOO_SOCKET_IFNAME", expected=f"of {', '.join(sorted(here))}", got=", ".join(unknown)
        )
