"""``fusewise decode`` cut short: the sizes it came to are printed, written and named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusewise.decode import attempt as decode_attempt
from fusewise.errors import RankError
from fusewise.ranks.supervisor import Failure, Outcome
from tests.command_line import run
from tests.compiled import boundary_profile

FAILED = Failure(1, "error", "decode 8: compile", None, "failed with out of memory", code=3)
Ending = Callable[[], Outcome]


def _interrupted() -> Outcome:
    raise KeyboardInterrupt


def _nursery_gone() -> Outcome:
    raise RankError("the process that starts ranks")


def _rows(batch: int, arms: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "phase": "decode", "tokens": batch, "message_bytes": 256 * batch, "arm": arm,
            "path": "gloo + rms_norm", "graph": "leave", "tokens_per_run": 8 * batch,
            "times_s": [0.5] * 6, "logits_difference": 0.0,
            "rounding_difference": 0.0,
        }
        for arm in arms
    ]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path, own_home: Path) -> tuple[str, ...]:
    profile = tmp_path / "profile.json"
    profile.write_text(boundary_profile(4, 64).to_json())
    return (
        "decode", "--batches", "4,8", "--prefill", "16", "--engine-cap", "1K",
        "--profile", str(profile), "--output", str(tmp_path / "run.json"),
    )  # fmt: skip


@pytest.fixture
def ranks_end(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Ranks that measure so many batches, each in its own event, and then end as told."""

    def end(how: Ending, *batches: int) -> None:
        def attempt(team: Any, job: str, request: dict[str, Any], told: Any, *_: Any) -> Outcome:
            for batch in batches:
                rows = _rows(batch, list(request["plans"]))
                for rank in team.ranks:
                    told(rank, {"kind": "measured", "rows": rows, "sites": {"leave": ["one"]}})
            return how()

        monkeypatch.setattr(decode_attempt, "run_attempt", attempt)
        nursery = contextlib.nullcontext()
        monkeypatch.setattr(decode_attempt, "Nursery", lambda *modules: nursery)

    return end


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (lambda: Outcome(failure=FAILED), 3, "decode stopped: rank 1 failed with out of memory"),
        (_nursery_gone, RankError.exit_code, "the process that starts ranks"),
        (_interrupted, 130, ""),
    ],
)
def test_whole_sizes_are_kept_however_the_ranks_ended(
    ranks_end: Any, words: tuple[str, ...], tmp_path: Path, how: Ending, code: int, said: str
) -> None:
    ranks_end(how, 4)
    out, err = run(*words, code=code)
    assert out.count("gloo + rms_norm") == 4, "one row per arm, from rank 0 alone"
    assert "Not reached: decode 8, prefill 16. What was measured before is kept." in err
    assert said in err
    document = json.loads((tmp_path / "run.json").read_text())
    assert {row["tokens"] for row in document["rows"]} == {4}
    assert document["sites"] == {"leave": ["one"]}
    assert document["unreached"] == [
        {"phase": "decode", "tokens": 8}, {"phase": "prefill", "tokens": 16},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (lambda: Outcome(failure=FAILED), 3, "out of memory"),
        (_interrupted, 130, "interrupted; nothing was written"),
    ],
)
def test_without_a_whole_size_nothing_is_written(
    ranks_end: Any, words: tuple[str, ...], tmp_path: Path, how: Ending, code: int, said: str
) -> None:
    ranks_end(how)
    out, err = run(*words, code=code)
    assert (out, said in err, "Not reached" in err) == ("", True, False)
    assert not (tmp_path / "run.json").exists()


def test_a_run_that_came_through_misses_nothing(
    ranks_end: Any, words: tuple[str, ...], tmp_path: Path
) -> None:
    ranks_end(Outcome, 4, 8)
    _, err = run(*words, "--prefill", "none")
    assert "Not reached" not in err
    document = json.loads((tmp_path / "run.json").read_text())
    assert ({row["tokens"] for row in document["rows"]}, document["unreached"]) == ({4, 8}, [])
