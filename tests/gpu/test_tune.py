"""The whole tune on two real GPUs: every candidate verified, and the plan run in a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusewise.backends.registry import backend_class
from fusewise.operation import backend_of
from fusewise.profiles.plan import derive
from fusewise.profiles.schema import Profile, parse_profile
from fusewise.ranks.teams import local_team
from fusewise.tune.settings import Settings
from fusewise.tune.supervise import tune_team
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="times need NVLink or PCIe between two GPUs"
)

SETTINGS = Settings("bfloat16", (2048,), 4096, 2**20, 20.0, rounds=7)


@pytest.fixture(scope="module")
def profile() -> Profile:
    found = tune_team(local_team(2), SETTINGS, lambda event: None)
    assert found is not None
    return found


@pytest.mark.timeout(500)
def test_what_says_it_is_available_is_verified_and_timed(profile: Profile) -> None:
    node = profile.fingerprint
    measured = {backend_of(path.name) for path in profile.paths}
    assert "nccl" in measured
    for item in profile.excluded:
        assert backend_class(item.path).available(node) is not None, item
    assert {sample.num_tokens for sample in profile.samples} >= {1, 256}


def _captured(rank: int, text: str) -> list[float]:
    from fusewise import Communicator
    from fusewise.operation import ALL_REDUCE_RMS_NORM
    from fusewise.shape import Shape
    from fusewise.tune.operands import normals

    device = torch.device("cuda", rank)
    errors = []
    with Communicator(profile=parse_profile(text, "the tuned profile")) as comm, torch.no_grad():
        for tokens in (1, 17, 256):
            shape = Shape(tokens, 2048)
            inputs = [normals(shape, r, device, 2) for r in range(2)]
            residual, weight = normals(shape, 7, device, 2), torch.ones_like(inputs[0][0])
            x = inputs[rank].clone()
            comm.all_reduce_rms_norm(x, residual, weight)
            graph: Any = torch.cuda.CUDAGraph()
            with comm.capture(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out, total = comm.all_reduce_rms_norm(x, residual, weight)
            for _ in range(10):
                graph.replay()
            exact = ALL_REDUCE_RMS_NORM.reference(inputs, residual, weight, 1e-6)
            for got, want in zip((out, total), exact, strict=True):
                errors.append(float((got.double() - want).norm() / want.norm()))
    return errors


@pytest.mark.timeout(300)
def test_the_plan_runs_captured_within_an_eps_of_float64(profile: Profile) -> None:
    assert derive(profile).tables
    first, second = run_ranks(_captured, 2, profile.to_json(), device="cuda", timeout_s=200)
    assert first == second
    assert max(first) < torch.finfo(torch.bfloat16).eps


def test_the_profile_is_named_after_the_node(profile: Profile, tmp_path: Path) -> None:
    assert profile.file_name.startswith("device=NVIDIA")
    assert ",tp=2," in profile.file_name
