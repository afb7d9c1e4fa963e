"""What the commands answer about SGLang, and that its page says the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import command_line

pytestmark = pytest.mark.usefixtures("own_home")


KIB = 2**10


def run(*arguments: str) -> tuple[str, str]:
    return command_line.run(*arguments, "--engine", "sglang")


def test_cap_gives_a_number_its_tokens_and_what_to_do() -> None:
    out, err = run("cap", "--profile", "nvidia-h200-tp2")
    assert out.splitlines() == ["8388608"]  # 2048 tokens of the smallest usual hidden size
    assert "2048 at hidden 2048, 2048 at hidden 4096, 2048 at hidden 7168" in err
    assert "--enforce-disable-flashinfer-allreduce-fusion" in err
    out, err = run("cap", "--profile", "nvidia-h200-tp2", "--no-custom-v2")
    assert out.splitlines() == ["4575232", "FUSEWISE_CAP=4575232"]
    assert "1117 at hidden 2048, 2048 at hidden 4096, 2048 at hidden 7168" in err
    document = json.loads(run("cap", "--profile", "nvidia-h200-tp8", "--format", "json")[0])
    (row,) = document["cap"]["rows"]
    assert (row["cap_bytes"], row["level"]) == (512 * KIB, "rule")
    assert [one["max_tokens"] for one in document["hidden_sizes"]["rows"]] == [128, 64, 36]


def test_the_pages_token_table_is_what_the_command_answers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text("utf-8")
    rows = re.findall(r"^\| `(nvidia\S+)` \| (?:`(.*?)`)? ?\|(.*)\|$", page, re.M)
    assert len(rows) == 5
    for profile, switches, cells in rows:
        *tokens, answered = (cell.strip() for cell in cells.split("|"))
        asked = ("cap", "--profile", profile, *switches.split(), "--format", "json")
        document = json.loads(run(*asked)[0])
        (row,) = document["cap"]["rows"]
        sizes = document["hidden_sizes"]["rows"]
        assert [str(one["max_tokens"]) for one in sizes] == tokens, switches
        assert row["origin"] == answered


def test_a_cap_of_ones_own_raises_nothing_that_only_tokens_bound() -> None:
    asked = ("--profile", "nvidia-h200-tp2", "--no-custom-v2", "--cap", "1G")
    _, err = run("cap", *asked)
    assert "2048 at hidden 2048, 2048 at hidden 4096, 2048 at hidden 7168" in err
    for size, path in (("8M", "flashinfer.one_shot"), ("16M", "nccl + rms_norm")):
        found = json.loads(run("explain", size, *asked, "--format", "json")[0])
        (row,) = found["engine"]["rows"]
        assert (row["with_cap"], row["cap_bytes"]) == (path, 8 * 2**20)
    # 11 % at 64M, which never fuses; up to its tokens NCCL, which runs instead, loses.
    nccl = ("--profile", "nvidia-h200-tp2", "--no-custom-all-reduce", "--cap", "1G")
    run("audit", *nccl, "--check", "5%")


def test_audit_and_explain_speak_of_sglangs_kernels() -> None:
    out, _ = run("audit", "--profile", "nvidia-h200-tp8", "--no-custom-all-reduce", "--symm-mem")
    for words in ("2048 tokens", "256K–512K at hidden 2048", "262144 (256K)", "-4.30"):
        assert words in out
    out, _ = run("explain", "1M", "--profile", "nvidia-h200-tp8")
    assert "sglang.multimem + rms_norm" in out


@pytest.mark.parametrize(
    ("size", "hidden_size", "with_cap"),
    [
        ("8M", 2048, "flashinfer.one_shot"),  # 2048 tokens
        ("8404992", 2048, "sglang.one_shot_push + rms_norm"),  # one row more
        ("16M", 4096, "flashinfer.one_shot"),
    ],
)
def test_explain_weighs_tokens_at_the_hidden_size_asked_about(
    size: str, hidden_size: int, with_cap: str
) -> None:
    asked = ("--hidden", str(hidden_size), "--profile", "nvidia-h200-tp2", "--format", "json")
    (row,) = json.loads(run("explain", size, *asked)[0])["engine"]["rows"]
    assert row["with_cap"] == with_cap
    assert row["engine_cap_bytes"] == 4096 * hidden_size
