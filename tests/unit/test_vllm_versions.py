"""Which vLLM the packaged profiles answer, with the versions each pins: docs/vllm.md's table.

Write the table anew with: ``python -m tests.unit.test_vllm_versions``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusewise.engines.cap import decide_cap
from fusewise.engines.vllm.engine import settings_on
from fusewise.node import Fingerprint
from fusewise.profiles.store import find_profile
from fusewise.shape import format_size

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "vllm.md"
RECORD: dict[str, Any] = json.loads((TESTS / "data" / "vllm_seams.json").read_text("utf-8"))
NODES = {"8×H200, multicast": (8, True), "2×H200, no multicast": (2, False)}
HEAD = "| vLLM | torch | FlashInfer | " + " | ".join(NODES) + " |\n|---|---|---|---|---|\n"
NOWHERE = {"FUSEWISE_HOME": "/nonexistent", "FUSEWISE_SITE_DIR": "/nonexistent"}


def answer(version: str, world_size: int, multicast: bool) -> tuple[str, str]:
    """The level that answers for this release on such a node, and what the table says of it."""
    pins = RECORD[version]["pins"]
    node = Fingerprint(
        device_type="cuda", device="NVIDIA H200", sm=90, world_size=world_size, fabric="nv18",
        multicast=multicast, driver="600.1", cuda="13.2", nccl="2.99.0",
        torch=pins["torch"] + "+cu132", flashinfer=pins["flashinfer-python"], kernels="0123",
    )  # fmt: skip
    found = find_profile(node, "bfloat16", environ=NOWHERE)
    settings = settings_on(version, node, "bfloat16", {}, {})
    decision = decide_cap(found.profile, settings, profile_level=found.level)
    assert decision.cap_bytes is not None
    if decision.level == "packaged profile":
        return decision.level, format_size(decision.cap_bytes)
    return decision.level, f"stays {format_size(decision.cap_bytes)}: {settings.fused_backend}"


def table() -> str:
    rows = [
        f"| {version} | {entry['pins']['torch']} | {entry['pins']['flashinfer-python']} | "
        + " | ".join(answer(version, *node)[1] for node in NODES.values())
        + " |"
        for version, entry in RECORD.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("version", RECORD)
def test_a_packaged_profile_applies_or_another_kernel_is_the_reason(
    version: str, node: str
) -> None:
    level, said = answer(version, *NODES[node])
    assert level == "packaged profile" or said.endswith("mnnvl")
    assert (level == "engine default") == (NODES[node][1] and RECORD[version]["prefers_mnnvl"])


def test_the_document_shows_the_table() -> None:
    assert table() in PAGE.read_text("utf-8")


if __name__ == "__main__":
    before, rest = PAGE.read_text("utf-8").split(HEAD.split("\n")[0])
    after = rest[rest.index("\n\n") :].lstrip("\n")
    PAGE.write_text(before + table() + "\n" + after, "utf-8")
