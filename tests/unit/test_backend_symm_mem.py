"""torch's symmetric-memory kernels: calls, results and limits."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.distributed import _symmetric_memory

from fusewise.backends import symm_mem
from fusewise.backends.base import Backend
from fusewise.errors import UnavailableError
from fusewise.shape import Shape
from tests.groups import MirrorGroup
from tests.provider_fakes import check_reduces, rows

MAX = Shape(64, 2048, "bfloat16")  # 256 KiB


@pytest.fixture
def symmetric(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Symmetric memory on the CPU, two ranks with equal tensors."""
    log = types.SimpleNamespace(handle=types.SimpleNamespace(multicast_ptr=64), ops=[])

    def doubled(name: str) -> Any:
        def op(view: torch.Tensor, reduce_op: str, group_name: str) -> torch.Tensor:
            schema = getattr(real, name).default._schema
            assert [a.name for a in schema.arguments] == ["input", "reduce_op", "group_name"]
            log.ops.append(name)
            return view * 2 if not name.endswith("_") else view.mul_(2)

        real = torch.ops.symm_mem
        getattr(real, name)  # the schema must exist in this torch
        return op

    namespace = types.SimpleNamespace(
        **{
            name: doubled(name)
            for name in ("one_shot_all_reduce", "two_shot_all_reduce_", "multimem_all_reduce_")
        }
    )
    monkeypatch.setattr(_symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(_symmetric_memory, "rendezvous", lambda tensor, group: log.handle)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(symm_mem.torch, "ops", types.SimpleNamespace(symm_mem=namespace))
    return log


@pytest.mark.parametrize("kind", [symm_mem.OneShot, symm_mem.TwoShot, symm_mem.Multimem])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_symm_mem_reduces(symmetric: Any, kind: type[Backend], dtype: Any) -> None:
    backend = kind(MirrorGroup(), MAX)  # type: ignore[arg-type]
    for num_tokens in (1, 7, 32):
        check_reduces(backend, rows(num_tokens, dtype=dtype))
    assert set(symmetric.ops) == {
        {"symm_mem.one_shot": "one_shot_all_reduce", "symm_mem.two_shot": "two_shot_all_reduce_",
         "multimem": "multimem_all_reduce_"}[kind.id]
    }  # fmt: skip
    backend.close()
    backend.close()
    with pytest.raises(UnavailableError, match="closed"):
        backend.all_reduce(rows(1))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(64, 2048, "bfloat16"), None),
        (Shape(65, 2048, "bfloat16"), "needs 266240 bytes of workspace, has 262144"),
        (Shape(32, 2048, "float32"), None),
        (Shape(33, 2048, "float32"), "has 262144"),
        (Shape(8, 2048, "float16"), "bfloat16 and float32 only"),
        (Shape(1, 8, "bfloat16"), None),
        (Shape(1, 7, "bfloat16"), "no multiple of 16"),
        (Shape(1, 4, "float32"), None),
        (Shape(0, 2048, "bfloat16"), "no multiple"),
    ],
)
def test_symm_mem_limits(symmetric: Any, shape: Shape, words: str | None) -> None:
    for kind in (symm_mem.OneShot, symm_mem.TwoShot, symm_mem.Multimem):
        refused = kind(MirrorGroup(), MAX).admits(shape)  # type: ignore[arg-type]
        assert refused is None if words is None else words in str(refused)


def test_multimem_without_multicast_address(symmetric: Any) -> None:
    symmetric.handle.multicast_ptr = 0
    with pytest.raises(UnavailableError, match=r"multimem: multicast.*no multicast address"):
        symm_mem.Multimem(MirrorGroup(), MAX)  # type: ignore[arg-type]
