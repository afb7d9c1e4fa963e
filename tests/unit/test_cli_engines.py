"""What `audit`, `cap` and `explain` answer about an engine: alike, and by the level that holds."""

from __future__ import annotations

import json
import re

import pytest

from fusewise.commands import options
from fusewise.profiles import store
from tests.command_line import SEED, answer, facts, run
from tests.samples import FUSED

pytestmark = pytest.mark.usefixtures("own_home")


TRTLLM = ("--version", "0.33", "--flashinfer-backend", "trtllm", *SEED)
VLLM = ("--engine", "vllm", "--version", "0.33", "--flashinfer-backend", "trtllm", *SEED)


def test_the_audit_of_the_seed_names_band_deltas_cap_and_token_caps() -> None:
    out, _ = run("audit", *VLLM)
    for text in (
        "256K–512K", "+0.86", "+0.05", "-1.87", "-4.30", "262144", "4.30 µs per call",
        '{"pass_config": {"fi_allreduce_fusion_max_size_mb": 0.25}}',
    ):  # fmt: skip
        assert text in out
    document = json.loads(run("audit", *VLLM, "--format", "json")[0])
    caps = {r["hidden_size"]: r["max_tokens"] for r in document["hidden_sizes"]["rows"]}
    assert caps == {2048: 64, 4096: 32, 7168: 18}
    deltas = [row["delta_us"] for row in document["sizes"]["rows"]]
    assert deltas == [0.86, 0.05, -1.87, -4.30]


@pytest.mark.parametrize(
    ("extra", "cap", "level"),
    [
        ((), 262144, ("flag", "published")),
        (("--no-multicast",), 524288, ("engine default", "engine default")),
        (("--nccl-symm-mem",), 131072, ("rule", "rule")),
        (("--nccl-symm-mem", "--cap", "0.5M"), 524288, ("flag", "explicit")),
    ],
)
def test_the_cap_follows_switches_and_an_explicit_one_wins(
    extra: tuple[str, ...], cap: int, level: tuple[str, str]
) -> None:
    found = facts("audit", *VLLM, *extra)
    assert (found["cap_bytes"], (found["level"], found["origin"])) == (cap, level)
    assert found["engine_cap_bytes"] == 524288


def test_the_engines_own_environment_counts_in_every_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`vllm check` said 131072 where `cap` and `audit` said 262144."""
    monkeypatch.setenv("VLLM_USE_NCCL_SYMM_MEM", "1")
    check = json.loads(
        run("vllm", "check", "--version", "0.33", *SEED, "--format", "json",
            env={"VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm"})[0]
    )  # fmt: skip
    answers = [
        check["summary"]["rows"][0]["cap_bytes"],
        facts("audit", *VLLM)["cap_bytes"],
        answer("cap", *VLLM)["cap_bytes"],
        answer("explain", "256K", *VLLM, table="engine")["cap_bytes"],
    ]
    assert answers == [131072] * 4
    monkeypatch.setenv("VLLM_USE_NCCL_SYMM_MEM", "maybe")
    assert "VLLM_USE_NCCL_SYMM_MEM" in run("cap", *VLLM, code=2)[1]


@pytest.mark.parametrize(("multicast", "cap"), [(True, 262144), (False, 524288)])
def test_on_its_own_node_every_command_asks_torch_about_multicast(
    multicast: bool, cap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = store.load("nvidia-h200-tp8").fingerprint
    monkeypatch.setattr(options, "this_node", lambda tp: mark)
    for module in ("question", "vllm"):
        monkeypatch.setattr(f"fusewise.commands.{module}.torch_multicast", lambda: multicast)
    asked = ("--version", "0.22")
    assert facts("audit", *asked)["cap_bytes"] == cap
    assert answer("cap", *asked)["cap_bytes"] == cap
    assert facts("vllm", "check", *asked)["cap_bytes"] == cap


def test_a_newer_release_is_answered_alike_by_every_command() -> None:
    """`vllm check` took the newest tables with a warning, `cap` and `audit` refused."""
    newer = ("--version", "0.99", *SEED)
    for command in (("cap",), ("audit",), ("explain", "256K"), ("vllm", "check")):
        _, err = run(*command, *newer)
        assert "vLLM 0.99 was not read; the tables of 0.33 stand for it" in err, command
    assert run("cap", *newer)[0] == run("cap", "--version", "0.33", *SEED)[0]


def test_where_an_engine_does_not_fuse_there_is_nothing_to_paste() -> None:
    alone = {"VLLM_BATCH_INVARIANT": "1"}
    out, err = run("cap", "--version", "0.33", *SEED, env=alone)
    assert out == "0\n"
    assert "does not fuse here" in err
    document = json.loads(run("cap", "--version", "0.33", *SEED, "--format", "json", env=alone)[0])
    (row,) = document["cap"]["rows"]
    assert (row["cap_bytes"], row["flag"], row["environment"]) == (None, None, None)


def test_the_level_reads_alike_in_every_command() -> None:
    asked = ("--version", "0.22", *SEED)
    for command in (("audit",), ("vllm", "check"), ("explain", "256K", "--engine", "vllm")):
        assert re.search(r"answered by +--profile \(published\)", run(*command, *asked)[0])
    assert "--profile (published)" in run("cap", *asked)[1]


def test_the_cap_of_a_hidden_size_is_its_own() -> None:
    """It printed the cap of 2048 whatever was asked."""
    asked = ("cap", "--version", "0.33", "--profile", "nvidia-h200-tp2")

    def printed(*hidden: str) -> int:
        return int(run(*asked, *hidden)[0].splitlines()[0])

    caps = [printed(*hidden) for hidden in ((), ("--hidden", "2048"), ("--hidden", "4096"))]
    narrow, wide = 1117 * 4096, 64 * 2**20
    assert caps == [narrow, narrow, wide]
    assert printed("--hidden", "4096,2048") == narrow
    document = json.loads(run(*asked, "--hidden", "4096,2048", "--format", "json")[0])
    assert [(row["hidden_size"], row["cap_bytes"]) for row in document["hidden_sizes"]["rows"]] == [
        (4096, wide), (2048, narrow),
    ]  # fmt: skip
    audit = json.loads(run("audit", *asked[1:], "--format", "json")[0])["hidden_sizes"]["rows"]
    assert {row["hidden_size"]: row["cap_bytes"] for row in audit} == {
        2048: narrow, 4096: wide, 7168: wide,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("share", "code"), [("31.6%", 7), ("0.316", 7), ("31.7%", 0), ("0", 7), ("99%", 0)]
)
def test_a_check_fails_above_its_share(share: str, code: int) -> None:
    out, err = run("audit", *TRTLLM, "--check", share, code=code)  # 4.30 of 13.6 µs at 512K
    assert "Measured sizes" in out
    assert ("fusing loses 31.6% at 512K" in err) == (code == 7)


def test_a_check_holds_what_is_set_and_never_passes_unseen() -> None:
    run("audit", *TRTLLM, "--check", "0", "--cap", "256K")
    run("audit", *TRTLLM, "--check", "0", "--cap", "384K", code=7)
    mnnvl = ("--version", "0.33", *SEED, "--flashinfer-backend", "mnnvl")
    assert "nothing could be compared" in run("audit", *mnnvl, "--check", "50%", code=7)[1]
    for word in ("-1", "100%", "two", ""):
        assert "--check" in run("audit", *TRTLLM, f"--check={word}", code=2)[1]


def test_cap_prints_the_number_and_the_flag_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = run("cap", *VLLM)
    assert out.splitlines()[:2] == [
        "262144",
        """--compilation-config '{"pass_config": {"fi_allreduce_fusion_max_size_mb": 0.25}}'""",
    ]
    assert "published" in err
    monkeypatch.setenv("FUSEWISE_CAP", "1M")
    assert run("cap", *VLLM)[0].splitlines()[0] == "1048576"
    assert run("cap", *VLLM, "--cap", "2M")[0].splitlines()[0] == "2097152"
    document = json.loads(run("cap", *VLLM, "--cap", "2M", "--format", "json")[0])
    (row,) = document["cap"]["rows"]
    assert (row["cap_bytes"], row["level"]) == (2097152, "flag")
    assert [one["max_tokens"] for one in document["hidden_sizes"]["rows"]] == [512, 256, 146]


def test_an_engines_option_asks_about_the_engine_without_naming_it() -> None:
    """`explain --cap` without an engine did nothing."""
    asked = ("explain", "384K", *SEED, "--flashinfer-backend", "trtllm", "--version", "0.33")
    assert answer(*asked, "--cap", "1M", table="engine")["with_cap"] == FUSED
    assert answer("explain", "384K", *SEED, "--cap", "256K", table="engine")["level"] == "flag"
    document = json.loads(run("explain", "384K", *SEED, "--format", "json")[0])
    assert "engine" not in document


def test_explain_says_which_level_answered_for_an_engines_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def level(*extra: str) -> str:
        return str(answer("explain", "384K", *VLLM, *extra, table="engine")["level"])

    assert level("--nccl-symm-mem") == "rule"
    assert level("--no-multicast") == "engine default"
    monkeypatch.setenv("FUSEWISE_CAP", "512K")
    assert level("--nccl-symm-mem") == "environment"
    assert level("--nccl-symm-mem", "--cap", "1M") == "flag"
