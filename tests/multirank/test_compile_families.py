"""transformers' families on two CPU ranks: every site taken that can be, and the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewise.graph.api import fusion_pass
from fusewise.graph.interpreted import interpreted_backend
from fusewise.run.communicator import Communicator
from tests.compiled import boundary_profile, count
from tests.families import FAMILIES, FUSE, HIDDEN, JOIN, build
from tests.ranks import run_ranks

pytest.importorskip("transformers")

pytestmark = pytest.mark.timeout(300)  # ranks compile; other suites may share the cores

TOKENS = 8


def _families(rank: int) -> dict[str, Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokens = torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    profile = boundary_profile(2 * TOKENS, HIDDEN, "bfloat16")
    with torch.no_grad(), Communicator(profile=profile) as communicator:
        return {name: _one(name, tokens, communicator) for name in FAMILIES}


def _one(name: str, tokens: Any, communicator: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    model = build(name, 2)
    fusion, graphs = fusion_pass(communicator=communicator), []
    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # it is called once
    backend = interpreted_backend(fusion, graphs.append)
    compiled = torch.compile(model, backend=backend, options=unguarded)
    got = compiled(tokens, use_cache=False).logits
    expected = model(tokens, use_cache=False).logits
    return {
        "sites": [site.choice if site.rewritten else site.why for site in fusion.sites],
        "fused": sum(count(graph, "fusewise::all_reduce_rms_norm") for graph in graphs),
        "reduced": sum(count(graph, "_c10d_functional::all_reduce") for graph in graphs),
        "difference": float((got - expected).abs().max()),
        "largest": float(expected.abs().max()),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_families, 2, timeout_s=280)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_is_taken_or_named_and_the_logits_stay(
    ranks: list[dict[str, Any]], name: str
) -> None:
    expected = FAMILIES[name][1]
    for results in ranks:
        result = results[name]
        assert result["sites"] == expected
        assert result["fused"] == expected.count(FUSE)
        assert result["reduced"] == len(expected) - expected.count(FUSE) - expected.count(JOIN)
        # bf16 keeps 8 bits; a layer's roundings in another order cost a few units of that.
        assert result["difference"] <= 2**-5 * result["largest"]
        assert result["largest"] > 0
