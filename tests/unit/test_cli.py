"""The command line's promises: data on stdout, the rest on stderr, codes, help that teaches."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from fusewise.commands import measuring, options
from fusewise.commands.after_tune import picture_of
from fusewise.errors import InputError
from fusewise.node import probe
from fusewise.profiles import store
from fusewise.tune.settings import Settings
from tests.command_line import SEED, answer, run
from tests.samples import FUSED, UNFUSED, profile_of

pytestmark = pytest.mark.usefixtures("own_home")


def test_several_dtypes_have_a_picture_each(tmp_path: Path) -> None:
    plot = tmp_path / "p.svg"
    assert picture_of(plot, "bfloat16", ["bfloat16"]) == plot
    made = {picture_of(plot, one, ["bfloat16", "float16"]) for one in ("bfloat16", "float16")}
    assert {file.name for file in made} == {"p-bfloat16.svg", "p-float16.svg"}


@pytest.mark.parametrize(
    ("size", "path"),
    [("256K", FUSED), ("262144", FUSED), ("384K", "multimem + rms_norm")],
)
def test_explain_says_path_level_and_evidence(size: str, path: str) -> None:
    document = json.loads(run("explain", size, *SEED, "--format", "json")[0])
    (found,) = document["explain"]["rows"]
    assert (found["path"], found["level"], found["origin"]) == (path, "flag", "published")
    assert {row["path"] for row in document["times"]["rows"]} == {FUSED, "multimem + rms_norm"}
    assert all(row["message_bytes"] == found["nearest_bytes"] for row in document["times"]["rows"])


def test_explain_shows_no_interval_that_nobody_published() -> None:
    out, _ = run("explain", "512K", *SEED)
    assert "-4.30 µs (no interval published)" in out
    found = answer("explain", "512K", *SEED)
    assert (found["gain_us"], found["gain_low_us"], found["gain_high_us"]) == (-4.3, None, None)


@pytest.mark.parametrize(
    ("size", "origin", "verdict"),
    [
        ("190K", "extrapolated", "inconclusive"),
        ("192K", "published", "fuse"),
        ("512K", "published", "do not fuse"),
        ("514K", "engine default", "inconclusive"),
    ],
)
def test_outside_the_measured_sizes_nothing_is_claimed(
    size: str, origin: str, verdict: str
) -> None:
    """Below the smallest measured size it said ``fuse``, as published."""
    found = answer("explain", size, *SEED)
    assert (found["origin"], found["verdict"]) == (origin, verdict)
    assert (found["because"] is None) == (origin == "published")


def test_without_a_profile_explain_says_default_and_show_fails_with_the_command_to_run() -> None:
    assert answer("explain", "256K")["level"] == "engine default"
    _, err = run("show", code=5)
    assert "fusewise tune" in err


def test_this_nodes_own_profile_answers_without_being_named() -> None:
    mark = probe(2, device_type="cpu")
    gloo = UNFUSED.replace("nccl", "gloo")
    rows = {1: {"shm.one_shot": 5.0, gloo: 8.0}, 64: {"shm.one_shot": 5.0, gloo: 8.0}}
    store.save(profile_of(rows, node=mark, baseline=gloo))
    found = answer("explain", "4K")
    assert (found["path"], found["level"]) == ("shm.one_shot", "user profile")
    beyond = answer("explain", "1M")
    assert (beyond["path"], beyond["level"]) == (gloo, "engine default")
    assert "was not measured" in run("explain", "4K", "--hidden", "4096")[0]
    assert found["note"] is None
    small = answer("explain", "4095")
    assert small["note"] == "smaller than one token (4096 bytes at hidden 2048): no model sends it"
    assert (small["num_tokens"], found["num_tokens"]) == (0, 1)
    assert "tokens" not in run("explain", "4095")[0].replace("token (", "")
    assert "is for bfloat16" not in run("explain", "4K", "--dtype", "fp16")[0]


def test_show_writes_every_form_and_its_pictures(tmp_path: Path) -> None:
    assert "multimem" in run("show", "nvidia-h200-tp8")[0]
    assert run("show", "nvidia-h200-tp8", "-f", "md")[0].count("|") > 50
    text = run("show", "nvidia-h200-tp8", "-f", "csv")[0]
    assert {len(row) for row in csv.reader(io.StringIO(text))} == {
        len(text.split("\n")[0].split(","))
    }
    assert run("show", *SEED, "-f", "csv")[0] == text
    svg, page = tmp_path / "p.svg", tmp_path / "p.html"
    _, err = run("show", "nvidia-h200-tp8", "--plot", str(svg), "--html", str(page))
    assert svg.read_text().startswith("<svg")
    assert "<svg" in page.read_text()
    assert f"wrote {svg}" in err


def test_report_writes_the_page_with_what_to_do(tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    out, err = run("report", *SEED, "-o", str(page))
    assert (out, err) == ("", f"fusewise: wrote {page}\n")
    assert "What to do next" in page.read_text()
    assert "(262144 bytes)" not in page.read_text(), "its kernels were not measured"
    for words in (("--engine", "vllm", "--version", "0.22"), ("--version", "0.22")):
        run("report", *SEED, *words, "-o", str(page))
        assert "(262144 bytes)" in page.read_text()
    run("report", *SEED, "--cap", "128K", "-o", str(page))
    assert "(131072 bytes)" in page.read_text()
    assert "512K" in page.read_text()
    run("report", *SEED, "--engine", "nobody", "-o", str(tmp_path / "q.html"), code=2)
    assert not (tmp_path / "q.html").exists()


def test_a_picture_without_matplotlib_asks_for_the_extra_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusewise.report.drawing.find_spec", lambda name: None)
    png = str(tmp_path / "p.png")
    for command in (("show", "nvidia-h200-tp8"), ("tune",), ("decode",)):
        out, err = run(*command, "--plot", png, code=3)
        assert out == "" or command[0] == "show"
        assert "pip install 'fusewise[plot]'" in err
    run("show", "nvidia-h200-tp8", "--plot", str(tmp_path / "p.svg"))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("explain", "25x"), 2, "not a message size"),
        (("explain", "4K", "--without", "natvie"), 2, "unknown backend"),
        (("explain", "4K", "--hidden", "0"), 2, "hidden size out of range"),
        (("explain", "4K", "--dtype", "fp8"), 2, "unknown dtype"),
        (("audit", "--profile", "nobody"), 5, "cannot read profile nobody"),
        (("audit", *SEED, "--engine", "tgi"), 2, "unknown engine"),
        (("audit", *SEED, "--version", "0.3"), 2, "unknown vLLM version"),
        (("tune", "--dtype", "int8"), 2, "unknown dtype"),
        (("tune", "--dtype", "bf16,int8"), 2, "unknown dtype"),
        (("verify", "--dtype", "int8"), 2, "unknown dtype"),
        (("decode", "--dtype", "int8"), 2, "unknown dtype"),
        (("bench", "--dtype", "int8"), 2, "unknown dtype"),
        (("cap",), 2, "an engine's tables are about GPUs"),
        (("tune", "--without", "natvie"), 2, "unknown backend"),
        (("tune", "--hidden", "2048,x"), 2, "not a list of sizes"),
        (("tune", "--hidden", "2047"), 2, "multiples of 8"),
        (("tune", "--budget", "soon"), 2, "not a duration"),
        (("tune", "--min-bytes", "8M", "--max-bytes", "4K"), 2, "size range is empty"),
        (("tune", "--tp", "0"), 2, "--tp"),
        (("tune", "--tp", "1"), 2, "nothing to measure: expected at least 2, got 1"),
        (("bench", "--tp", "1"), 2, "nothing to measure: expected at least 2, got 1"),
        (("verify", "--tp", "1"), 2, "nothing to measure: expected at least 2, got 1"),
        (("explain", "1K", "--tp", "-2"), 2, "--tp"),
        (("cap", *SEED, "--tp", "3"), 2, "is of 8 ranks"),
        (("tune", "--tp", "4096"), 2, "cannot start that many ranks"),
        (("tune", "--without", "gloo"), 2, "cannot be left out"),
        (("tune", "--hidden", "9" * 5000), 2, "not a list of sizes"),
        (("tune", "--into", "/proc/x"), 3, "cannot keep profiles in /proc/x"),
        (("tune", "--plot", "x.foo"), 2, "expected .svg or .png"),
        (("tune", "--plot", "/nope/x.svg"), 3, "cannot write /nope/x.svg"),
        (("show", *SEED, "--html", "/nope/x.html"), 3, "cannot write /nope/x.html"),
        (("show", *SEED, "--html", "/"), 3, "expected a file"),
        (("show", *SEED, "--plot", "/proc/x.svg"), 3, "cannot write /proc/x.svg"),
        (("decode", "--output", "/nope/x.json"), 3, "cannot write /nope/x.json"),
        (("decode", "--plot", "x.pdf"), 2, "expected .svg or .png"),
        (("decode", "--steps", "0"), 2, "counts out of range"),
        (("decode", "--repeats", "4"), 2, "repeats out of range: expected 5 to 1001"),
        (("report", *SEED, "-o", "/nope/x.html"), 3, "cannot write /nope/x.html: got a directory"),
        (("show", "nvidia-h200-tp8", *SEED), 2, "two profiles"),
        (("show", "nvidia-h200-tp8", "--format", "xml"), 2, "xml"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_bad_words_end_with_a_code_and_a_reason_before_anything_starts(
    arguments: tuple[str, ...], code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "busy", lambda: ["busy"])
    out, err = run(*arguments, code=code)
    assert out == ""
    assert text in err
    assert "busy" not in err, "nobody needs to know yet"


READING = (
    ("show",), ("explain", "4K"), ("audit",), ("cap",), ("vllm", "check", "--version", "0.33"),
    ("vllm", "patch", "--version", "0.33"),
)  # fmt: skip


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_every_reading_command_takes_a_profile_and_treats_a_wrong_dtype_alike(
    command: tuple[str, ...],
) -> None:
    """One ignored it, one took the engine's default, one failed with another code."""
    _, err = run(*command, *SEED, "--dtype", "fp16", code=2)
    assert "nvidia-h200-tp8 is of bfloat16: got --dtype fp16" in err
    _, err = run(*command, *SEED, "--dtype", "int8", code=2)
    assert "unknown dtype: expected bf16, fp16 or fp32" in err


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [("FUSEWISE_CAP", "much", 2), ("FUSEWISE_PROFILE", "nope", 5), ("FUSEWISE_STRICT", "yes", 2)],
)
def test_a_variable_with_a_wrong_value_is_named(variable: str, value: str, code: int) -> None:
    profile = () if variable != "FUSEWISE_CAP" else SEED
    _, err = run("cap", *profile, code=code, env={variable: value})
    assert variable in err
    assert value in err


def test_the_profile_of_a_named_file_brings_its_dtype(tmp_path: Path) -> None:
    rows = {1: {FUSED: 5.0, UNFUSED: 8.0}}
    file = tmp_path / "half.json"
    file.write_text(profile_of(rows).model_copy(update={"dtype": "float16"}).to_json())
    assert answer("explain", "4K", "--profile", str(file))["dtype"] == "float16"
    run("explain", "4K", "--profile", str(file), "--dtype", "fp16")


@pytest.mark.parametrize(
    ("text", "spent_s"), [("90s", 90), ("1.5m", 90), ("2 min", 120), ("7", 7), ("1h", 3600)]
)
def test_durations(text: str, spent_s: float) -> None:
    assert options.seconds(text) == spent_s


def test_settings_on_both_sides_of_their_bounds() -> None:
    def made(**changes: object) -> Settings:
        return Settings(
            **{"dtype": "bfloat16", "hidden_sizes": (8,), "min_bytes": 1, "max_bytes": 16,
               "budget_s": 1.0} | changes  # type: ignore[arg-type]
        )  # fmt: skip

    good = ({"rounds": 5}, {"rounds": 1001}, {"hidden_sizes": (65536,), "max_bytes": 2**17},
            {"budget_s": 86_400})  # fmt: skip
    bad = ({"rounds": 4}, {"rounds": 1002}, {"hidden_sizes": (65544,)}, {"hidden_sizes": (12,)},
           {"hidden_sizes": (8, 8)}, {"hidden_sizes": ()}, {"budget_s": 0}, {"min_bytes": 16},
           {"max_bytes": 15}, {"hidden_sizes": (8, 16)},
           {"budget_s": float("nan")})  # fmt: skip
    for changes in good:
        assert made(**changes)
    for changes in bad:
        with pytest.raises(InputError):
            made(**changes)
