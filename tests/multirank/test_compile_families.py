"""transformers' families on two CPU ranks: every site taken that can be, and the same logits.

Dynamo's half of a compilation, which is the same on both ranks, one of them does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusewise.graph.api import fusion_pass
from fusewise.graph.interpreted import interpreted_backend
from fusewise.run.communicator import Communicator
from tests import shared_traces
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
    # Ready made: making one is a sixth of a model's trace, and none of its sites.
    mask = torch.full((1, 1, TOKENS, TOKENS), float("-inf"), dtype=torch.bfloat16).triu(1)
    inputs = {"tokens": tokens, "mask": mask}
    profile = boundary_profile(2 * TOKENS, HIDDEN, "bfloat16")
    with torch.no_grad(), Communicator(profile=profile) as communicator:
        models = {name: build(name, 2) for name in FAMILIES}
        graphs = _graphs(rank, models, inputs)
        return {n: _one(model, inputs, graphs[n], communicator) for n, model in models.items()}


def _logits(model: Any, tokens: Any, mask: Any) -> Any:
    return model(tokens, attention_mask=mask, use_cache=False).logits


def _graphs(rank: int, models: dict[str, Any], inputs: dict[str, Any]) -> dict[str, bytes]:
    """Every model's, half of them traced here and half on the other rank."""
    mine = {
        n: shared_traces.captured(_logits, model=models[n], **inputs) for n in list(models)[rank::2]
    }
    each: list[Any] = [None, None]
    dist.all_gather_object(each, mine)
    return {**each[0], **each[1]}


def _one(model: Any, inputs: dict[str, Any], graph: bytes, communicator: Any) -> dict[str, Any]:
    fusion, graphs = fusion_pass(communicator=communicator), []
    backend = interpreted_backend(fusion, graphs.append)
    got = shared_traces.run(graph, backend, model=model, **inputs)
    expected = _logits(model, **inputs)
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
