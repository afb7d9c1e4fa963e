"""A process group with a control channel: bounded gathers, votes and agreements by name.

The control channel is torch's rendezvous store, not a collective: it needs no device, has a
deadline, and knows who is missing. Data never travels here; decisions do.
"""

from __future__ import annotations

import json
import weakref
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fusewise.errors import (
    DisagreementError,
    InputError,
    RankError,
    RankTimeoutError,
    UnavailableError,
)
from fusewise.ranks.place import shares_gpus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

DEFAULT_TIMEOUT_S = 120.0  # the slowest step behind a vote: a provider compiling its kernels

_uses: dict[str, int] = {}


class Group:
    """The ranks that all-reduce together, and what they tell each other.

    Every method that talks takes a ``phase``: the words an error uses for what was going on. All
    ranks must call the same methods in the same order; a rank that does not arrive is named.

    Refers to torch's group without keeping it: torch owns it until ``destroy_process_group``. One
    kept until the interpreter ends would be torn down then, and gloo's threads abort the process.

    Args:
        process_group: torch's group; None for the default (world) group.
        device: where this rank's tensors live; by default the current GPU for an NCCL group, and
            where torch was told that ranks share GPUs (``ranks.place``); else the CPU.
        timeout_s: bound of every wait.

    Raises:
        InputError: that is no process group.
        UnavailableError: torch.distributed is not initialised, or this rank is not a member.
    """

    def __init__(
        self,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if not dist.is_initialized():
            raise UnavailableError(
                "no process group",
                hint="Call torch.distributed.init_process_group first, or start with torchrun.",
            )
        if process_group is None:
            process_group = dist.distributed_c10d._get_default_group()
        given: object = process_group
        outside: object = dist.GroupMember.NON_GROUP_MEMBER  # what torch gives those it leaves out
        if given is not outside and not isinstance(given, dist.ProcessGroup):
            got = type(given).__name__
            raise InputError("group", expected="a torch.distributed process group", got=got)
        if dist.get_rank(process_group) < 0:
            raise UnavailableError("this rank is not a member of the group it was given")
        self._process_group = weakref.ref(process_group)
        self.name = str(process_group.group_name)  # torch's, as compiled graphs refer to it
        self.rank = dist.get_rank(process_group)
        self.ranks: list[int] = dist.get_process_group_ranks(process_group)
        self.world_size = len(self.ranks)
        self.timeout_s = timeout_s
        self.device = torch.device(device) if device is not None else _default_device(self)
        self._store = self._open_store()
        self._turn = 0

    @property
    def process_group(self) -> ProcessGroup:
        """torch's group.

        Raises:
            UnavailableError: it was destroyed.
        """
        found = self._process_group()
        if found is None:
            raise UnavailableError(
                f"{self}: its process group was destroyed",
                hint="Close the communicator before destroy_process_group; then create new ones.",
            )
        return found

    def _open_store(self) -> Store:
        # torch's name is part of it: ranks may have used groups of these members unequally often.
        members = "/".join([self.name, "-".join(map(str, self.ranks))])
        use = _uses[members] = _uses.get(members, 0) + 1
        root = dist.distributed_c10d._get_default_store()
        return dist.distributed_c10d.PrefixStore(f"fusewise/{members}/{use}", root)

    def gather(self, phase: str, value: Any) -> list[Any]:
        """Every rank's JSON-like ``value``, in rank order, on every rank.

        Raises:
            RankTimeoutError: names the ranks that did not arrive within ``timeout_s``.
        """
        self._turn += 1
        keys = [f"{self._turn}/{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], json.dumps([phase, value]))
        arrived: list[Any] = []
        try:
            self._store.wait(keys, timedelta(seconds=self.timeout_s))
            arrived = [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:  # every store's own kind of timeout or broken connection
            missing = [self.ranks[r] for r, key in enumerate(keys) if not self._has(key)]
            raise RankTimeoutError(
                f"{self}: waiting at {phase!r}",
                expected=f"all of ranks {self.ranks} within {self.timeout_s:g} s",
                got=f"no answer from {missing or 'the store'}",
                hint="See those ranks' own output for the cause.",
            ) from error
        # Whoever arrived at this turn has read all of the turn before: its key can go.
        if self._turn > 1:
            self._store.delete_key(f"{self._turn - 1}/{self.rank}")
        phases = {rank: item[0] for rank, item in zip(self.ranks, arrived, strict=True)}
        if len(set(phases.values())) > 1:
            raise RankError(f"{self}: ranks are at different steps", got=str(phases))
        return [item[1] for item in arrived]

    def _has(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError:  # the store itself is gone
            return False

    def broadcast(self, phase: str, value: Any) -> Any:
        """Rank 0's JSON-like ``value`` on every rank; the others' argument is ignored."""
        return self.gather(phase, value if self.rank == 0 else None)[0]

    def barrier(self, phase: str) -> None:
        """All ranks, or an error naming those that are missing."""
        self.gather(phase, None)

    def agree(self, phase: str, value: Any) -> None:
        """Checks that all ranks hold an equal ``value``.

        Raises:
            DisagreementError: lists the value of every rank.
        """
        values = self.gather(phase, value)
        if any(other != values[0] for other in values):
            listed = "; ".join(f"rank {r}: {v}" for r, v in zip(self.ranks, values, strict=True))
            raise DisagreementError(
                f"{self}: ranks disagree at {phase!r}",
                expected="one value on all ranks",
                got=listed,
                hint="Start every rank with the same profile, settings and versions.",
            )

    def vote(self, phase: str, error: BaseException | str | None) -> str | None:
        """What failed on any rank, in one line; None when nothing did anywhere.

        A rank that failed calls this too, so that its peers need not wait for it in a collective.
        """
        errors = self.gather(phase, None if error is None else _brief(error))
        failed = [
            f"rank {r}: {e}" for r, e in zip(self.ranks, errors, strict=True) if e is not None
        ]
        return f"{phase}: {'; '.join(failed)}" if failed else None

    def unanimous(self, phase: str, value: Any, fault: BaseException | str | None = None) -> None:
        """Returns on all ranks or on none: each came in time, without a fault, with one ``value``.

        Rank 0 judges, and a verdict is written once: a rank that waited in vain puts a refusal in
        its place, and whoever comes late finds what stands there. So no rank goes ahead alone. A
        rank waits at most twice ``timeout_s``.

        Raises:
            DisagreementError: who is missing, at fault or of another opinion; on every rank.
        """
        self._turn += 1
        verdict = f"{self._turn}/verdict"
        mine = [phase, value, None if fault is None else _brief(fault)]
        self._store.set(f"{self._turn}/{self.rank}", json.dumps(mine))
        refusal = self._judged(phase, value) if self.rank == 0 else self._awaited(verdict)
        stands = json.loads(self._store.compare_set(verdict, "", json.dumps(refusal)))
        if stands:
            raise DisagreementError(f"{self}: not all ranks could go ahead with {phase}: {stands}")

    def _judged(self, phase: str, value: Any) -> str:
        """Why not all can go ahead; nothing when all can."""
        keys = [f"{self._turn}/{rank}" for rank in range(self.world_size)]
        try:
            self._store.wait(keys, timedelta(seconds=self.timeout_s))
        except RuntimeError:  # as in gather
            missing = [self.ranks[r] for r, key in enumerate(keys) if not self._has(key)]
            return f"no answer from ranks {missing} within {self.timeout_s:g} s"
        told = [json.loads(self._store.get(key)) for key in keys]
        faults = {r: fault for r, (_, _, fault) in zip(self.ranks, told, strict=True) if fault}
        if faults:
            return "; ".join(f"rank {r}: {fault}" for r, fault in faults.items())
        mine = json.loads(json.dumps([phase, value]))
        if any([at, other] != mine for at, other, _ in told):
            values = ((r, other) for r, (_, other, _) in zip(self.ranks, told, strict=True))
            return "; ".join(f"rank {r} says {other}" for r, other in values)
        return ""

    def _awaited(self, verdict: str) -> str:
        """What to put in the verdict's place if it never came."""
        wait_s = 2 * self.timeout_s
        try:
            self._store.wait([verdict], timedelta(seconds=wait_s))
        except RuntimeError:  # as in gather
            return f"rank {self.ranks[self.rank]} heard nothing from rank {self.ranks[0]}"
        return ""

    @contextmanager
    def bounded_store(self) -> Iterator[None]:
        """While a provider waits for the peers over torch's store itself: ``timeout_s`` ends that.

        torch's own bound is the process group's, half an hour by default, and it may keep the
        interpreter's lock that long. The group's store belongs to the whole process: whoever else
        waits in it without a bound of his own has this one meanwhile.
        """
        store = dist.distributed_c10d._get_process_group_store(self.process_group)
        before = store.timeout  # type: ignore[attr-defined]  # missing in its stub
        store.set_timeout(timedelta(seconds=self.timeout_s))
        try:
            yield
        finally:
            store.set_timeout(before)

    def __str__(self) -> str:
        return f"group of ranks {self.ranks}"


def _brief(error: BaseException | str) -> str:
    if isinstance(error, str):
        return error
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:400]


def _default_device(group: Group) -> torch.device:
    on_gpus = "nccl" in str(dist.get_backend(group.process_group)) or shares_gpus()
    if on_gpus and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
