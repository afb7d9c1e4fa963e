"""CONTRIBUTING's recipes, followed in a copy of the package: a file or folder, and one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fusewise

BACKEND = '''
"""All ranks' rows gathered by torch, summed in rank order: a backend as CONTRIBUTING has it."""

import torch
import torch.distributed as dist

from fusewise.backends.base import Backend
from fusewise.profiles.schema import Numerics


class Gathered(Backend):
    """An unfused all-reduce."""

    id = "gathered"
    provider = "gathered"
    numerics = Numerics(accumulation="float32", order="rank", rounds_sum=True)

    @classmethod
    def available(cls, node):
        return None if node.device_type == "cpu" else "for CPU ranks only"

    def all_reduce(self, x):
        rows = [torch.empty_like(x) for _ in range(self.group.world_size)]
        dist.all_gather(rows, x, group=self.group.process_group)
        return torch.stack(rows).float().sum(0).to(x.dtype)
'''

ENGINE = '''
"""An engine that fuses up to 512 tokens, whatever their width, and else runs NCCL."""

from fusewise.engines.base import Engine, EngineSettings, Flag, RuleCap, Threshold


class ToySettings(EngineSettings):
    """One toy on one node."""

    threshold = Threshold(num_tokens=512)

    def fused_choice(self, message_bytes, hidden_size):
        return "flashinfer.one_shot"

    def unfused_choice(self, message_bytes, hidden_size):
        return "nccl + rms_norm"

    displaced_choice = unfused_choice

    def rule(self, hidden_size=None):
        return RuleCap(self.cap_bytes(hidden_size), False, "no rule")

    def flag(self, cap_bytes):
        return f"--toy-cap {cap_bytes}"

    def environment(self, cap_bytes):
        return None

    def notes(self, measured=()):
        return ["A toy."]


def settings_on(version, node, dtype, environ, flags):
    """The toy on a node; its flag ``wide`` doubles the ranks."""
    ranks = node.world_size * (2 if flags.get("wide") else 1)
    return ToySettings(version, node.sm, ranks, node.multicast, dtype)


ENGINE = Engine("toy", "toy-engine", ("1.0",), settings_on, (Flag("wide", "--wide", "Wider."),))
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, with a backend and an engine added by the recipes."""
    root = tmp_path_factory.mktemp("tree")
    package = root / "fusewise"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fusewise.__file__).parent, package, ignore=ignored)
    (package / "backends" / "gathered.py").write_text(BACKEND)
    insert(
        package / "backends" / "registry.py", '"gloo": "', '    "gathered": "gathered:Gathered",'
    )
    (package / "engines" / "toy").mkdir()
    (package / "engines" / "toy" / "__init__.py").write_text(ENGINE)
    insert(package / "engines" / "registry.py", '"vllm": "', '    "toy": "fusewise.engines.toy",')
    return root


def insert(file: Path, before: str, line: str) -> None:
    """Adds one line behind the line that holds ``before``."""
    lines = file.read_text().splitlines()
    at = next(i for i, text in enumerate(lines) if before in text)
    file.write_text("\n".join([*lines[: at + 1], line, *lines[at + 1 :], ""]))


def run(tree: Path, command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FUSEWISE_")}
    done = subprocess.run(
        [sys.executable, "-m", "fusewise", *command.split()],
        env=inherited
        | {"PYTHONPATH": str(tree), "FUSEWISE_HOME": str(tree / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tree, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def test_an_added_backend_is_verified_timed_and_in_the_profile(tree: Path) -> None:
    small = "--hidden 64 --min-bytes 1K --max-bytes 2K --budget 2s --rounds 5 --format json"
    run(tree, f"tune {small}")
    (written,) = (tree / "home" / "profiles").glob("device=*.json")
    profile: dict[str, Any] = json.loads(written.read_text())
    assert "gathered + rms_norm" in {sample["path"] for sample in profile["samples"]}


def test_an_added_engine_answers_cap_and_audit(tree: Path) -> None:
    asked = "--engine toy --profile nvidia-h200-tp2"
    cap = run(tree, f"cap {asked}").stdout.splitlines()
    # 512 tokens of the published columns: fusing wins up to there, at every hidden size.
    audit = json.loads(run(tree, f"audit {asked} --format json").stdout)
    (facts,) = audit["summary"]["rows"]
    assert (facts["engine"], facts["engine_version"]) == ("toy", "1.0")
    assert (facts["engine_cap_bytes"], facts["engine_cap_tokens"]) == (None, 512)
    fused = {row["num_tokens"]: row["fused_today"] for row in audit["sizes"]["rows"]}
    assert fused[512] and not fused[1024]
    assert cap == [str(facts["cap_bytes"]), f"--toy-cap {cap[0]}"]
    assert "A toy." in audit["hidden_sizes"]["notes"]
    assert (facts["level"], facts["origin"]) == ("flag", "published")


def test_an_added_engines_flag_is_its_own(tree: Path) -> None:
    assert "--wide" in run(tree, "cap --help").stdout
    wide = "cap --wide --profile nvidia-h200-tp2"
    assert "world_size 2 in the profile, 4 asked" in run(tree, f"{wide} --engine toy", 5).stderr
    assert "vllm has no option --wide" in run(tree, f"{wide} --engine vllm", 2).stderr
