"""The command line's promises: data on stdout, the rest on stderr, codes, help that teaches."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusewise.commands import options
from fusewise.commands.app import app
from fusewise.errors import InputError
from fusewise.node import probe
from fusewise.profiles import store
from fusewise.tune.settings import Settings
from tests.samples import FUSED, UNFUSED, profile_of

SEED = ("--profile", "nvidia-h200-tp8")
VLLM = ("--engine", "vllm", "--version", "0.33", "--flashinfer-backend", "trtllm", *SEED)


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUSEWISE_SITE_DIR", str(tmp_path / "site"))
    monkeypatch.delenv("FUSEWISE_PROFILE", raising=False)
    monkeypatch.delenv("FUSEWISE_CAP", raising=False)
    monkeypatch.setattr("sys.argv", ["fusewise"])


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def facts(*arguments: str) -> dict[str, str]:
    """The first table of a JSON answer as fact → value."""
    document = json.loads(run(*arguments, "--format", "json")[0])
    return {row["fact"]: row["value"] for row in document["summary"]["rows"]}


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
        ((), "262144 (256K)", "--profile (published)"),
        (("--no-multicast",), "524288 (512K)", "engine default (engine default)"),
        (("--nccl-symm-mem",), "131072 (128K)", "rule (rule)"),
        (("--nccl-symm-mem", "--cap", "0.5M"), "524288 (512K)", "flag (explicit)"),
    ],
)
def test_the_cap_follows_switches_and_an_explicit_one_wins(
    extra: tuple[str, ...], cap: str, level: str
) -> None:
    found = facts("audit", *VLLM, *extra)
    assert (found["cap"], found["answered by"]) == (cap, level)


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
    row = json.loads(run("cap", *VLLM, "--cap", "2M", "--format", "json")[0])["rows"][0]
    assert (row["cap_bytes"], row["level"], row["max_tokens[2048]"]) == (2097152, "flag", 512)


@pytest.mark.parametrize(
    ("size", "path"),
    [("256K", FUSED), ("262144", FUSED), ("384K", "multimem + rms_norm")],
)
def test_explain_says_path_level_and_evidence(size: str, path: str) -> None:
    rows = json.loads(run("explain", size, *SEED, "--format", "json")[0])["rows"]
    (found,) = rows
    assert (found["path"], found["level"], found["origin"]) == (path, "flag", "published")
    assert "µs" in found["nearest_measured"]


def test_explain_says_which_level_answered_for_an_engines_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def level(*extra: str) -> str:
        out = run("explain", "384K", *VLLM, *extra, "--format", "json")[0]
        return str(json.loads(out)["rows"][0]["engine_level"])

    assert level("--nccl-symm-mem") == "rule"
    assert level("--no-multicast") == "engine default"
    monkeypatch.setenv("FUSEWISE_CAP", "512K")
    assert level("--nccl-symm-mem") == "environment"
    assert level("--nccl-symm-mem", "--cap", "1M") == "flag"


def test_without_a_profile_explain_says_default_and_show_fails_with_the_command_to_run() -> None:
    out, _ = run("explain", "256K", "--format", "json")
    assert json.loads(out)["rows"][0]["level"] == "engine default"
    _, err = run("show", code=5)
    assert "fusewise tune" in err


def test_this_nodes_own_profile_answers_without_being_named() -> None:
    mark = probe(2, device_type="cpu")
    gloo = UNFUSED.replace("nccl", "gloo")
    rows = {1: {"shm.one_shot": 5.0, gloo: 8.0}, 64: {"shm.one_shot": 5.0, gloo: 8.0}}
    store.save(profile_of(rows, node=mark, baseline=gloo))
    found = json.loads(run("explain", "4K", "--format", "json")[0])["rows"][0]
    assert (found["path"], found["level"]) == ("shm.one_shot", "user profile")
    beyond = json.loads(run("explain", "1M", "--format", "json")[0])["rows"][0]
    assert (beyond["path"], beyond["level"]) == (gloo, "engine default")
    assert "was not measured" in run("explain", "4K", "--hidden", "4096")[0]
    assert "is for bfloat16" not in run("explain", "4K", "--dtype", "fp16")[0]


def test_show_writes_every_form_and_its_pictures(tmp_path: Path) -> None:
    assert "multimem" in run("show", "nvidia-h200-tp8")[0]
    assert run("show", "nvidia-h200-tp8", "-f", "md")[0].count("|") > 50
    text = run("show", "nvidia-h200-tp8", "-f", "csv")[0]
    assert any(len(row) > 5 for row in csv.reader(io.StringIO(text)))
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
    run("report", *SEED, "-o", "/nope/p.html", code=3)
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
        (("explain", "4K", "--hidden", "0"), 2, "hidden size out of range"),
        (("explain", "4K", "--dtype", "fp8"), 2, "unknown dtype"),
        (("audit", "--profile", "nobody"), 5, "cannot read profile nobody"),
        (("audit", *SEED, "--engine", "sglang"), 2, "unknown engine"),
        (("audit", *SEED, "--version", "9.9"), 2, "unknown vLLM version"),
        (("cap",), 2, "an engine's tables are about GPUs"),
        (("tune", "--without", "natvie"), 2, "unknown backend"),
        (("tune", "--hidden", "2048,x"), 2, "not a list of sizes"),
        (("tune", "--hidden", "2047"), 2, "multiples of 8"),
        (("tune", "--budget", "soon"), 2, "not a duration"),
        (("tune", "--min-bytes", "8M", "--max-bytes", "4K"), 2, "size range is empty"),
        (("tune", "--tp", "0"), 2, "--tp"),
        (("explain", "1K", "--tp", "-2"), 2, "--tp"),
        (("cap", *SEED, "--tp", "3"), 2, "is of 8 ranks"),
        (("tune", "--tp", "4096"), 2, "cannot start that many ranks"),
        (("tune", "--without", "gloo"), 2, "cannot be left out"),
        (("tune", "--hidden", "9" * 5000), 2, "not a list of sizes"),
        (("tune", "--into", "/proc/x"), 3, "cannot keep profiles in /proc/x"),
        (("tune", "--plot", "x.foo"), 2, "cannot draw there"),
        (("tune", "--plot", "/nope/x.svg"), 2, "cannot draw there"),
        (("bench", "--dtype", "int8"), 2, "unknown dtype"),
        (("show", "nvidia-h200-tp8", "--format", "xml"), 2, "xml"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_bad_words_end_with_a_code_and_a_reason_before_anything_starts(
    arguments: tuple[str, ...], code: int, text: str
) -> None:
    out, err = run(*arguments, code=code)
    assert out == ""
    assert text in err


def test_a_file_that_cannot_be_written_is_one_line() -> None:
    result = CliRunner().invoke(app, ["show", "nvidia-h200-tp8", "--html", "/nope/x.html"])
    assert result.exit_code == 3
    assert "/nope/x.html" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_doctor_goes_on_when_the_named_profile_is_ill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWISE_PROFILE", "nope")
    out, _ = run("doctor")
    assert "cannot read profile nope" in out
    assert "shm.one_shot" in out


def test_help_teaches_and_names_the_exit_codes() -> None:
    out, _ = run("--help")
    for word in ("tune", "bench", "show", "explain", "audit", "cap", "doctor", "130 interrupted"):
        assert word in out
    assert "torchrun --nproc-per-node 8 -m fusewise tune" in " ".join(
        run("tune", "--help")[0].split()
    )


def test_doctor_gives_every_backend_a_reason_or_none() -> None:
    from fusewise.backends.registry import all_ids

    document = json.loads(run("doctor", "-f", "json")[0])
    rows = {row["backend"]: row for row in document["backends"]["rows"]}
    assert list(rows) == all_ids()
    for row in rows.values():
        assert row["available"] == (row["reason"] is None)
    assert rows["gloo"]["available"]
    assert "GPU" in rows["nccl"]["reason"]


_ABSENT = "sys.modules['torch'] = None"
_BROKEN = """
class Broken(abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("libfoo.so", name="torch._C")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("how", [_ABSENT, _BROKEN], ids=["absent", "broken"])
def test_without_torch_the_doctor_says_so_and_the_rest_is_one_line(how: str) -> None:
    code = (
        f"import sys\nfrom importlib import abc\n{how}\nfrom fusewise.__main__ import main\nmain()"
    )
    said = "torch cannot be imported" if how is _ABSENT else "libfoo.so"

    def ran(*command: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", code, *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    doctor = ran("doctor", "-f", "json")
    assert doctor.returncode == 0, doctor.stderr
    rows = json.loads(doctor.stdout)["backends"]["rows"]
    assert len(rows) > 8
    assert all(said in row["reason"] and not row["available"] for row in rows)
    tune = ran("tune", "--budget", "1", "--hidden", "64")
    assert (tune.returncode, tune.stdout) == (3, "")
    assert said in tune.stderr
    assert "Traceback" not in tune.stderr


@pytest.mark.parametrize(
    ("text", "spent_s"), [("90s", 90), ("1.5m", 90), ("2 min", 120), ("7", 7), ("1h", 3600)]
)
def test_durations(text: str, spent_s: float) -> None:
    assert options.seconds(text) == spent_s


def test_settings_on_both_sides_of_their_bounds() -> None:
    def made(**changes: object) -> Settings:
        return Settings(
            **{"dtype": "bfloat16", "hidden_sizes": (8,), "min_bytes": 1, "max_bytes": 2,
               "budget_s": 1.0} | changes  # type: ignore[arg-type]
        )  # fmt: skip

    good = ({"rounds": 5}, {"rounds": 1001}, {"hidden_sizes": (65536,)}, {"budget_s": 86_400})
    bad = ({"rounds": 4}, {"rounds": 1002}, {"hidden_sizes": (65544,)}, {"hidden_sizes": (12,)},
           {"hidden_sizes": (8, 8)}, {"hidden_sizes": ()}, {"budget_s": 0}, {"min_bytes": 2},
           {"budget_s": float("nan")})  # fmt: skip
    for changes in good:
        assert made(**changes)
    for changes in bad:
        with pytest.raises(InputError):
            made(**changes)
