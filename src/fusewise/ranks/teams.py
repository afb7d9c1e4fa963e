"""Which ranks a process starts: all of this host's, or the one torchrun gave it.

Knows how ranks are laid out, not what they run.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from fusewise.errors import InputError
from fusewise.node import Fingerprint, gpu_count, probe
from fusewise.ranks.place import (
    PLACES,
    Place,
    check_interface,
    default_place,
    default_ranks,
    place_for,
)

if TYPE_CHECKING:
    from fusewise.ranks.group import Group


@dataclass(frozen=True)
class Team:
    """The ranks of one tensor-parallel group and those of them that this process supervises.

    Under torchrun ``peers`` is the group of this team's supervisors and ``world`` that of all
    supervisors; both are None when this process has all ranks. ``host`` is rank 0's address.
    """

    world_size: int
    ranks: tuple[int, ...]
    local_ranks: tuple[int, ...]
    place: Place
    peers: Group | None = None
    world: Group | None = None
    host: str = "127.0.0.1"
    hosts: int = 1

    @property
    def device(self) -> str:
        """torch's type of the ranks' devices."""
        return self.place.device_type

    def node(self) -> Fingerprint:
        """What these ranks run on, as this process sees it."""
        kind = None if self.device == "cuda" else "cpu"
        return probe(self.world_size, nodes=self.hosts, device_type=kind, shared=self.place.shared)

    @property
    def leads(self) -> bool:
        """Whether this process supervises rank 0, and so prints and writes."""
        return 0 in self.ranks


def local_team(world_size: int | None, *, share: bool = False) -> Team:
    """All ranks of one group on this host: one per GPU, else two CPU ranks.

    Args:
        world_size: how many; None for ``default_ranks()``.
        share: whether several ranks may have one GPU.

    Raises:
        InputError: fewer than two ranks, or more than this host runs.
        UnavailableError: one GPU and nobody to share it, or too little memory on it.
    """
    size = world_size if world_size is not None else default_ranks()
    _check_several(size)
    place = default_place(share=share) if world_size is None else place_for(size, share=share)
    ranks = tuple(range(size))
    return Team(size, ranks, ranks, place)


def under_torchrun() -> bool:
    """Whether torchrun (or a launcher that sets its variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def torchrun_team(world_size: int | None, timeout_s: float) -> Team:
    """This process's team under torchrun: consecutive ranks, by default those of one node.

    Collective over all torchrun ranks; initialises torch.distributed with gloo.

    Raises:
        InputError: a team of one, a size that does not divide torchrun's world, or ranks without
            a GPU each.
    """
    import torch.distributed as dist

    from fusewise.ranks.group import Group

    rank = _whole("RANK", os.environ["RANK"])
    total = _whole("WORLD_SIZE", os.environ["WORLD_SIZE"])
    local_rank = _whole("LOCAL_RANK", os.environ.get("LOCAL_RANK", str(rank)))
    here = _whole("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "0"))
    size = world_size or here or total
    _check_several(size)
    if total % size:
        raise InputError(
            "torchrun's world does not split into teams",
            expected=f"a divisor of {total}",
            got=str(size),
            hint="Pass --tp with a divisor, or change --nproc-per-node.",
        )
    place = place_for(here or 1) if gpu_count() else PLACES["cpu"]
    check_interface()
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    world = Group(device="cpu", timeout_s=timeout_s)
    teams = [dist.new_group(list(range(t, t + size))) for t in range(0, total, size)]
    peers = Group(teams[rank // size], device="cpu", timeout_s=timeout_s)
    hosts = peers.gather("hosts", socket.gethostname())
    spread = len(set(hosts))
    host = "127.0.0.1" if spread == 1 else hosts[0]
    return Team(size, (peers.rank,), (local_rank,), place, peers, world, host, spread)


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(
            f"{name} is not what torchrun sets", expected="a whole number", got=repr(text[:40]),
            hint="Start with torchrun, or unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.",
        )  # fmt: skip
    return int(text)


def _check_several(ranks: int) -> None:
    if ranks < 2:
        raise InputError(
            "a group of one rank has nothing to measure",
            expected="at least 2",
            got=str(ranks),
            hint="Leave --tp out for this node's own number, or pass a larger one.",
        )
