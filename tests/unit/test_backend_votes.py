"""A provider that fails on one rank is given up on all ranks, at once and by name."""

from __future__ import annotations

from typing import Any

from tests.provider_fakes import Fakes
from tests.ranks import run_ranks


class _Patch:
    """What ``Fakes.install`` needs of monkeypatch, in a process that ends after the test."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        setattr(target, name, value)

    def setitem(self, target: Any, name: str, value: Any) -> None:
        target[name] = value


def _fail(*arguments: Any, **named: Any) -> Any:
    raise MemoryError("injected")


def _fail_in_each_step(rank: int) -> list[str]:
    """Builds each backend with one step failing on rank 1; the errors as this rank sees them."""
    from fusewise.backends import custom, flashinfer
    from fusewise.errors import UnavailableError
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

    group, told = Group(timeout_s=20), []
    for kind, owner, step in [
        (custom.Custom, "cudart", "cudaMalloc"),
        (custom.Custom, "cudart", "cudaIpcOpenMemHandle"),
        (custom.Custom, "vllm", "init_custom_ar"),
        (flashinfer.OneShot, "comm", "create_allreduce_fusion_workspace"),
    ]:
        fakes = Fakes()
        fakes.install(_Patch())
        custom._all_linked = lambda uuids, rank: True  # type: ignore[assignment]
        if rank == 1:
            setattr(getattr(fakes, owner), step, _fail)
        try:
            kind(group, Shape(8, 2048)).close()
            told.append("built")
        except UnavailableError as error:
            told.append(str(error))
        assert not fakes.cudart.live and not fakes.cudart.mapped, "a failed build leaves memory"
        assert len(fakes.comm.released) == (owner == "comm" and rank == 0)
    return told


def _capture_different_graphs(rank: int) -> str:
    """Rank 1 captures one all-reduce more; then nobody may use the backend again."""
    import torch

    from fusewise.backends import custom
    from fusewise.errors import RankError
    from fusewise.ranks.group import Group
    from fusewise.shape import Shape

    fakes = Fakes()
    fakes.install(_Patch())
    custom._all_linked = lambda uuids, rank: True  # type: ignore[assignment]
    backend = custom.Custom(Group(timeout_s=20), Shape(8, 2048))
    backend.capture_begin()
    fakes.vllm.capturing = True
    for _ in range(1 + rank):
        backend.all_reduce(torch.ones(1, 2048))
    fakes.vllm.capturing = False
    try:
        backend.capture_end()
    except RankError as error:
        told = str(error)
    assert backend.admits(Shape(1, 2048)) is not None
    backend.close()
    assert not fakes.cudart.live
    return told


def _both(rank: int) -> tuple[list[str], str]:
    return _fail_in_each_step(rank), _capture_different_graphs(rank)


def test_a_failure_on_one_rank_is_told_on_all() -> None:
    (first, mismatch), (second, other) = run_ranks(_both, 2)
    assert first == second
    for text, step in zip(first, ["allocate", "map peers", "start", "workspace"], strict=True):
        assert step in text and "rank 1: MemoryError: injected" in text
        assert "rank 0:" not in text
    assert mismatch == other and "rank 0: 1, rank 1: 2" in mismatch
