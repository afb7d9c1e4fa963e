"""``fusewise decode`` on two CPU ranks, as a user calls it, as small as it goes."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fusewise.commands.decode import decode
from tests.compiled import boundary_profile

pytest.importorskip("transformers")

pytestmark = pytest.mark.timeout(300)  # ranks trace a model; other suites may share the cores

BATCH, PREFILLS = 3, (5, 7)
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(decode)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], bytes]:
    """One run; every plan fuses at the batch and leaves the prefill, which saves compiles."""
    folder = tmp_path_factory.mktemp("decode")
    profile = folder / "profile.json"
    profile.write_text(boundary_profile(4, 64).to_json())
    words = (
        f"--layers 1 --batches {BATCH} --prefill {','.join(map(str, PREFILLS))} "
        "--steps 2 --repeats 5 --context 4 "
        f"--engine-cap 1K --profile {profile} --output {folder / 'run.json'} "
        f"--plot {folder / 'run.svg'}"
    )
    usual = os.dup(2)  # the ranks write there too
    with (folder / "log").open("wb") as log:
        os.dup2(log.fileno(), 2)
        try:
            result = CliRunner().invoke(app, words.split())
        finally:
            os.dup2(usual, 2)
            os.close(usual)
    said = (folder / "log").read_text().splitlines()
    assert result.exit_code == 0, "\n".join([result.output, *said])
    graphs = [line for line in said if line.startswith("graph ")]
    assert len(graphs) == len(set(graphs)) == 2, (
        "one prefill for both lengths, and the step, of rank 0"
    )
    assert not any("FutureWarning" in line for line in said)
    document = json.loads((folder / "run.json").read_text())
    return result.stdout, document, (folder / "run.svg").read_bytes()


def test_every_arm_ran_at_every_size(run: tuple[str, dict[str, Any], bytes]) -> None:
    _, document, _ = run
    graphs = {(row["phase"], row["arm"]): row["graph"] for row in document["rows"]}
    arms = ("unfused", "engine-cap", "effective-cap", "measured")
    fused = {("decode", arm): "leave" if arm == "unfused" else "fuse" for arm in arms}
    assert graphs == fused | {("prefill", arm): "leave" for arm in arms}


def test_rows_are_consistent(run: tuple[str, dict[str, Any], bytes]) -> None:
    _, document, _ = run
    for row in document["rows"]:
        assert len(row["times_s"]) == 5 and all(time_s > 0 for time_s in row["times_s"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["tokens_per_run"] == (2 * BATCH if row["phase"] == "decode" else row["tokens"])
        assert row["logits_difference"] <= 1e-4  # fp32
        assert 0 < row["rounding_difference"] <= 1e-4
        if row["arm"] == "unfused":
            assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == 1.0
    stars: dict[tuple[str, int], set[tuple[str, str]]] = {}
    for row in document["rows"]:
        if row["best"]:
            stars.setdefault((row["phase"], row["tokens"]), set()).add((row["path"], row["graph"]))
    assert {size: len(run) for size, run in stars.items()} == {
        ("decode", BATCH): 1, **{("prefill", tokens): 1 for tokens in PREFILLS},
    }, "one way to run is the fastest, whichever arms take it"  # fmt: skip


def test_the_pass_rewrote_every_layer(run: tuple[str, dict[str, Any], bytes]) -> None:
    sites = run[1]["sites"]
    assert len(sites["fuse"]) == 3  # the embedding's and one layer's two, in the step
    assert len(sites["leave"]) == 2 * 3  # the other arm's step, and one prefill for both lengths
    assert all(": fuse (" in site for site in sites["fuse"])


def test_table_and_picture_show_all_arms(run: tuple[str, dict[str, Any], bytes]) -> None:
    table, document, picture = run
    for arm in document["arms"]:
        assert arm["name"] in table
        assert arm["name"].encode() in picture


def test_a_run_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "decode starts its ranks itself" in result.output
