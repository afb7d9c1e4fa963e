"""FlashInfer's fused kernels: calls, results, workspaces and limits."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewise.backends import flashinfer, flashinfer_limits
from fusewise.backends.base import Backend
from fusewise.backends.flashinfer_mnnvl import Mnnvl
from fusewise.backends.norm import residual_rms_norm
from fusewise.errors import InputError, UnavailableError
from fusewise.shape import DType, Shape
from tests.groups import MirrorGroup
from tests.provider_fakes import FakeComm, Fakes, FakeVllm, check_reduces, rows

MAX = Shape(64, 2048, "bfloat16")  # 256 KiB


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    made.install(monkeypatch)
    return made


@pytest.mark.parametrize("kind", [flashinfer.OneShot, flashinfer.TwoShot, Mnnvl])
def test_flashinfer_fuses(fakes: Fakes, kind: type[Backend]) -> None:
    backend = kind(MirrorGroup(), MAX)  # type: ignore[arg-type]
    x, residual, weight = rows(5), rows(6)[:5].contiguous(), rows(1).view(-1)
    norm, total = backend.all_reduce_rms_norm(x, residual, weight, 1e-5)
    expected_norm, expected_total = residual_rms_norm(2 * x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(norm, expected_norm)
    check_reduces(backend, x)
    for call in fakes.comm.calls:
        assert call["pdl"] and call["at_end"] and call["fp32_acc"]
        own = {"flashinfer.one_shot": True, "flashinfer.two_shot": False, "flashinfer.mnnvl": None}
        assert call["one_shot"] is own[kind.id]
    assert [call["pattern"] for call in fakes.comm.calls] == [1, 0, 0]


def test_flashinfer_refuses_what_its_pattern_lacks(fakes: Fakes) -> None:
    backend = flashinfer.OneShot(MirrorGroup(), MAX)  # type: ignore[arg-type]
    assert not backend.takes_no_residual and not backend.takes_weight_bias
    x = rows(2)
    with pytest.raises(InputError, match="a residual and no weight bias"):
        backend.all_reduce_rms_norm(x, None, x[0], 1e-6)
    with pytest.raises(InputError, match="a residual and no weight bias"):
        backend.all_reduce_rms_norm(x, x, x[0], 1e-6, 1.0)


def test_flashinfer_uses_a_weight_bias_where_the_api_has_one(fakes: Fakes) -> None:
    inner, seen = fakes.comm.allreduce_fusion, []

    def newer(weight_bias: float = 0.0, **arguments: Any) -> torch.Tensor:
        seen.append(weight_bias)
        return inner(**arguments)

    fakes.comm.allreduce_fusion = newer  # type: ignore[method-assign]
    backend = flashinfer.OneShot(MirrorGroup(), MAX)  # type: ignore[arg-type]
    assert backend.takes_weight_bias
    backend.all_reduce_rms_norm(rows(2), rows(2), rows(1).view(-1), 1e-6, 1.0)
    assert seen == [1.0]


def test_flashinfer_closes_the_buffers_flashinfer_keeps(fakes: Fakes) -> None:
    backend = flashinfer.TwoShot(MirrorGroup(), MAX)  # type: ignore[arg-type]
    workspace = backend._workspace
    backend.close()
    backend.close()
    assert workspace.destroyed and fakes.comm.released == [workspace.ipc_handles]
    assert backend.admits(Shape(8, 2048)) == "it is closed"
    with pytest.raises(UnavailableError, match="closed"):
        backend.all_reduce(rows(1))


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        (flashinfer.OneShot, Shape(63, 2048), None),
        (flashinfer.OneShot, Shape(64, 2048), None),
        (flashinfer.OneShot, Shape(65, 2048), "needs 266240 bytes of workspace, has 262144"),
        (flashinfer.OneShot, Shape(128, 1024), None),
        (flashinfer.OneShot, Shape(1, 2048), None),
        (flashinfer.OneShot, Shape(0, 2048), "no row"),
        (flashinfer.TwoShot, Shape(2, 2048), "more than 2 tokens"),
        (flashinfer.TwoShot, Shape(3, 2048), None),
        (flashinfer.OneShot, Shape(1, 2048, "float32"), "initialised for bfloat16"),
        (flashinfer.OneShot, Shape(1, 2048, "float16"), None),
        (flashinfer.OneShot, Shape(1, 2044), "no multiple of 16"),
        (Mnnvl, Shape(1, 2048), None),
        (Mnnvl, Shape(64, 2048), None),
        (Mnnvl, Shape(65, 2048), "needs 266240 bytes of workspace, has 262144"),
    ],
)
def test_flashinfer_limits(
    fakes: Fakes, kind: type[Backend], shape: Shape, words: str | None
) -> None:
    refused = kind(MirrorGroup(), MAX).admits(shape)  # type: ignore[arg-type]
    assert refused is None if words is None else words in str(refused)


def test_flashinfer_asks_for_memory_before_the_collective(fakes: Fakes) -> None:
    fakes.free = 2 * 64 * 2048 * (2 + 3 * 2)  # two ranks: a staging buffer and three Lamport turns
    assert flashinfer.OneShot(MirrorGroup(), MAX).admits(MAX) is None  # type: ignore[arg-type]
    fakes.free -= 1
    with pytest.raises(UnavailableError, match=r"memory.*expected 2097152 bytes"):
        flashinfer.OneShot(MirrorGroup(), MAX)  # type: ignore[arg-type]


def test_flashinfer_believes_its_own_workspace(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = flashinfer.OneShot(MirrorGroup(), MAX)  # type: ignore[arg-type]
    monkeypatch.setattr(backend._workspace, "is_buffer_size_sufficient", lambda *a: False)
    assert "flashinfer says" in str(backend.admits(Shape(1, 2048)))


@pytest.mark.parametrize(
    ("hidden_size", "fits"),
    [(2048, True), (2880, True), (3584, True), (7168, True), (8192, True), (65536, True),
     (65544, False), (8 * 1024, True), (8 * 1023, True), (8 * 1025, False), (16 * 1025, False),
     (8 * 1032, True)],
)  # fmt: skip
def test_flashinfer_rows_split_into_clusters(hidden_size: int, fits: bool) -> None:
    """Against the launcher's rule told differently: some cluster of 8, 4, 2, 1 CTAs divides."""
    threads = hidden_size // 8
    assert fits == any(threads % c == 0 and threads // c <= 1024 for c in (8, 4, 2, 1))
    assert (flashinfer_limits.launch_problem(Shape(1, hidden_size)) is None) == fits


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flashinfer_workspace_stays_below_its_int32_offset(world_size: int, dtype: DType) -> None:
    element_bytes = 2 if dtype == "bfloat16" else 4
    huge = flashinfer_limits.workspace_elements(Shape(2**20, 8192, dtype), world_size)
    lamport_bytes = world_size * huge * element_bytes
    assert 2 * lamport_bytes < 2**31 <= 2 * (lamport_bytes + world_size * element_bytes * 1024)
    assert flashinfer_limits.workspace_elements(Shape(64, 2048, dtype), world_size) == 64 * 2048
    assert flashinfer_limits.workspace_elements(Shape(1, 1025, dtype), world_size) == 2048


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flashinfer_two_shot_has_room_for_input_and_sum(
    fakes: Fakes, world_size: int, dtype: DType
) -> None:
    shape = Shape(64, 2048, dtype)
    group: Any = MirrorGroup(world_size)
    made = flashinfer.TwoShot(group, shape)._workspace.made
    buffer_bytes = world_size * made["max_token_num"] * made["hidden_dim"] * 2
    assert buffer_bytes >= 2 * shape.message_bytes
    assert made["group"] is group.process_group


@pytest.mark.parametrize("num_tokens", [129, 255, 1023])
def test_mnnvl_has_room_for_tokens_rounded_up_to_the_ranks(fakes: Fakes, num_tokens: int) -> None:
    """Above 1 MiB over all ranks it runs in two stages, with whole rounds of tokens."""
    largest = Shape(num_tokens, 4096)
    backend = Mnnvl(MirrorGroup(8), largest)  # type: ignore[arg-type]
    assert backend.admits(largest) is None
    backend.close()
    assert backend._workspace is None
    assert fakes.comm.released == []  # trtllm's table of buffers is none of its business


def test_mnnvl_without_a_multicast_address_is_not_built(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.provider_fakes.MnnvlWorkspace.mc_ptr", 0)
    with pytest.raises(UnavailableError, match="no multicast address"):
        Mnnvl(MirrorGroup(), MAX)  # type: ignore[arg-type]


def test_mnnvl_asks_for_memory_before_the_collective(fakes: Fakes) -> None:
    fakes.free = 3 * 2**20  # three buffers, each for one-shot up to 1 MiB over all ranks
    assert Mnnvl(MirrorGroup(), MAX).admits(MAX) is None  # type: ignore[arg-type]
    fakes.free -= 1
    with pytest.raises(UnavailableError, match="memory"):
        Mnnvl(MirrorGroup(), MAX)  # type: ignore[arg-type]


def test_fakes_have_flashinfers_parameters() -> None:
    """Read from the installed sources, which no CPU machine can import."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        pytest.skip("flashinfer is not installed; the recorded parameters stand")
    folder = Path(spec.origin).parent / "comm"
    for fake, file in (
        (FakeComm, "allreduce.py"),
        (FakeComm, "trtllm_ar.py"),
        (FakeVllm, "vllm_ar.py"),
    ):
        for node in ast.parse((folder / file).read_text()).body:
            recorded = isinstance(node, ast.FunctionDef) and getattr(fake, node.name, None)
            if isinstance(node, ast.FunctionDef) and recorded:
                known = [name for name in inspect.signature(recorded).parameters if name != "self"]
                assert [a.arg for a in node.args.args][: len(known)] == known, node.name
