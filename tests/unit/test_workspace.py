"""Slot memory: how much, for which shapes, and what happens when a rank cannot have it."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from fusewise.backends.native import workspace
from fusewise.backends.native.workspace import SlotLayout, Workspace
from fusewise.errors import DisagreementError, UnavailableError, WorkspaceError
from fusewise.shape import Shape
from tests.groups import MirrorGroup

MIB = 2**20


@pytest.mark.parametrize(
    ("world_size", "num_tokens", "hidden_size", "size_bytes"),
    [
        (2, 1, 2048, 2 * 4096),  # two phases from one peer
        (8, 1, 2048, 2 * 8 * 4096),  # two phases from every rank, its own free
        (2, 3, 2880, 2 * 3 * 12 * 512),  # 5760 bytes begin a twelfth unit
        (2, 1, 256, 2 * 512),  # exactly one unit
        (2, 1, 264, 2 * 1024),  # 16 bytes more
    ],
)
def test_size_of_one_shot(
    world_size: int, num_tokens: int, hidden_size: int, size_bytes: int
) -> None:
    layout = SlotLayout.one_shot(Shape(num_tokens, hidden_size), world_size)
    assert layout.size_bytes == size_bytes


@pytest.mark.parametrize(
    ("world_size", "num_tokens", "hidden_size", "size_bytes"),
    [
        (8, 1, 2048, 3 * 8 * 512 + 512),  # 32 vectors each: one unit; 128 bytes of partial sums
        (8, 1, 2056, 3 * 8 * 1024 + 512),  # 33 vectors for the first ranks: a second unit
        (4, 100, 2048, 3 * 4 * 200 * 512 + 12800),  # 200 units of 16 words
    ],
)
def test_size_of_two_shot(
    world_size: int, num_tokens: int, hidden_size: int, size_bytes: int
) -> None:
    layout = SlotLayout.two_shot(Shape(num_tokens, hidden_size), world_size)
    assert layout.size_bytes == size_bytes


def test_what_fits_and_what_does_not() -> None:
    have = SlotLayout.two_shot(Shape(10, 2048), 4)
    assert have.lacks(SlotLayout.two_shot(Shape(10, 2048), 4)) is None
    assert have.lacks(SlotLayout.two_shot(Shape(11, 2048), 4)) == (
        "needs 22 slots of 512 bytes per peer, has 20"
    )
    assert have.lacks(SlotLayout.two_shot(Shape(20, 512), 4)) is None


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("strategy", [SlotLayout.one_shot, SlotLayout.two_shot])
def test_room_for_64_mib_holds_it_at_every_usual_width(strategy: Any, world_size: int) -> None:
    widest = Shape(4096, 8192)
    room = strategy(widest, world_size).with_slack()
    for hidden_size in (2048, 2880, 3584, 4096, 5120, 7168, 8192):
        shape = Shape(64 * MIB // (2 * hidden_size), hidden_size)
        assert room.lacks(strategy(shape, world_size)) is None


def test_union_holds_both() -> None:
    tall, wide = SlotLayout.two_shot(Shape(90, 256), 4), SlotLayout.two_shot(Shape(20, 8192), 4)
    both = tall.union(wide)
    assert both.lacks(tall) is None and both.lacks(wide) is None
    assert both.units == wide.units


class Host:
    """torch's symmetric memory on the CPU: one rank, its peers' addresses made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world_size: int = 2) -> None:
        self.allocated: list[int] = []
        self.addresses = [4096 * (rank + 1) for rank in range(world_size)]
        monkeypatch.setattr(workspace, "symmetric_bytes", self.allocate)
        monkeypatch.setattr(workspace, "rendezvous", self.rendezvous)
        monkeypatch.setattr(workspace, "_mapped_words", lambda n: torch.zeros(n, dtype=torch.int32))

    def allocate(self, size_bytes: int, device: torch.device) -> torch.Tensor:
        self.allocated.append(size_bytes)
        return torch.empty(min(size_bytes, 2**16), dtype=torch.uint8)  # nobody looks further

    def rendezvous(self, buffer: torch.Tensor, group: Any) -> Any:
        assert buffer.unique().tolist() == [
            workspace.EMPTY_BYTE
        ]  # empty before a peer can reach it
        return types.SimpleNamespace(buffer_ptrs=self.addresses)


LAYOUT = SlotLayout.one_shot(Shape(4, 2048), 2)


def test_it_is_empty_and_mapped_after_a_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    host, group = Host(monkeypatch), MirrorGroup()
    made = Workspace(group, LAYOUT, "native")  # type: ignore[arg-type]
    assert host.allocated == [LAYOUT.size_bytes]
    assert made.region.slots == host.addresses
    assert made.region.epochs.tolist() == [0] * LAYOUT.units
    steps = ("status", "allocate", "rendezvous", "map")
    assert group.phases == [f"native: {step}" for step in steps]


@pytest.mark.parametrize(
    ("step", "phase"),
    [
        ("_mapped_words", "status"),
        ("symmetric_bytes", "allocate"),
        ("rendezvous", "rendezvous"),
    ],
)
def test_a_failing_step_names_the_rank_and_goes_no_further(
    monkeypatch: pytest.MonkeyPatch, step: str, phase: str
) -> None:
    Host(monkeypatch)
    group = MirrorGroup()

    def refuse(*arguments: Any) -> None:
        raise PermissionError("pidfd_getfd: operation not permitted")

    monkeypatch.setattr(workspace, step, refuse)
    with pytest.raises(WorkspaceError, match="rank 0: PermissionError: pidfd_getfd") as raised:
        Workspace(group, LAYOUT, "native")  # type: ignore[arg-type]
    assert ("SYS_PTRACE" in str(raised.value)) is (step == "rendezvous")
    assert group.phases[-1] == f"native: {phase}"


def test_a_peers_failure_is_this_ranks_failure_before_any_rendezvous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, group = Host(monkeypatch), MirrorGroup()
    refused = "native: allocate"
    monkeypatch.setattr(
        group, "vote", lambda phase, e: f"{phase}: rank 1: out of memory" if phase == refused else e
    )
    monkeypatch.setattr(host, "rendezvous", lambda *a: pytest.fail("met a rank that is not there"))
    with pytest.raises(WorkspaceError, match="native: allocate: rank 1: out of memory"):
        Workspace(group, LAYOUT, "native")  # type: ignore[arg-type]


def test_an_unmapped_peer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Host(monkeypatch).addresses[1] = 0
    with pytest.raises(WorkspaceError, match="a peer's memory is not mapped"):
        Workspace(MirrorGroup(), LAYOUT, "native")  # type: ignore[arg-type]


def test_it_grows_once_and_keeps_what_captured_graphs_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    made = Workspace(MirrorGroup(), LAYOUT, "native")  # type: ignore[arg-type]
    first = made.region
    assert not made.reserve(SlotLayout.one_shot(Shape(4, 2048), 2))
    assert made.region is first
    assert made.reserve(SlotLayout.one_shot(Shape(5, 2048), 2))
    assert made.region is not first and first.slots
    assert host.allocated == [LAYOUT.size_bytes, LAYOUT.size_bytes * 5 // 4]
    made.close()
    assert not first.slots and not made.region.slots
    made.close()
    with pytest.raises(UnavailableError, match="closed"):
        made.reserve(LAYOUT)


def test_a_failed_growth_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    made = Workspace(MirrorGroup(), LAYOUT, "native")  # type: ignore[arg-type]
    first = made.region

    def full(size_bytes: int, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workspace, "symmetric_bytes", full)
    with pytest.raises(WorkspaceError, match="out of memory"):
        made.reserve(SlotLayout.one_shot(Shape(5, 2048), 2))
    assert made.region is first and first.slots == host.addresses


def test_ranks_that_ask_for_different_sizes_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Host(monkeypatch)
    group = MirrorGroup()
    made = Workspace(group, LAYOUT, "native")  # type: ignore[arg-type]

    def differ(phase: str, value: Any) -> None:
        raise DisagreementError(phase)

    monkeypatch.setattr(group, "agree", differ)
    with pytest.raises(DisagreementError, match="native: workspace"):
        made.reserve(LAYOUT)
