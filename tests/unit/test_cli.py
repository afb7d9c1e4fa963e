"""The command line's promises: data on stdout, the rest on stderr, codes, help that teaches."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fusewise
from fusewise.commands import options
from fusewise.commands.after_tune import picture_of
from fusewise.commands.app import app
from fusewise.errors import EXIT_CODES, FusewiseError, InputError
from fusewise.node import probe
from fusewise.profiles import store
from fusewise.tune.settings import Settings
from tests.samples import FUSED, UNFUSED, profile_of

SEED = ("--profile", "nvidia-h200-tp8")
TRTLLM = ("--version", "0.33", "--flashinfer-backend", "trtllm", *SEED)
VLLM = ("--engine", "vllm", "--version", "0.33", "--flashinfer-backend", "trtllm", *SEED)


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUSEWISE_SITE_DIR", str(tmp_path / "site"))
    monkeypatch.delenv("FUSEWISE_PROFILE", raising=False)
    monkeypatch.delenv("FUSEWISE_CAP", raising=False)
    monkeypatch.setattr("sys.argv", ["fusewise"])


def run(*arguments: str, code: int = 0, env: dict[str, str] | None = None) -> tuple[str, str]:
    result = CliRunner().invoke(app, arguments, env=env)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def answer(*arguments: str, table: str | None = None) -> Any:
    """The one row of a table of a JSON answer; the command's own table by default."""
    document = json.loads(run(*arguments, "--format", "json")[0])
    (row,) = document[table or arguments[0]]["rows"]
    return row


def facts(*arguments: str) -> Any:
    return answer(*arguments, table="summary")


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


def test_output_is_a_file_wherever_it_is_an_option() -> None:
    helps = [
        parameter.help
        for command in ALL.values()
        for parameter in command.params
        if "--output" in parameter.opts
    ]
    assert helps
    assert all(re.search(r"JSON|file", text) and "older" not in text for text in helps)


def test_several_dtypes_have_a_picture_each(tmp_path: Path) -> None:
    plot = tmp_path / "p.svg"
    assert picture_of(plot, "bfloat16", ["bfloat16"]) == plot
    made = {picture_of(plot, one, ["bfloat16", "float16"]) for one in ("bfloat16", "float16")}
    assert {file.name for file in made} == {"p-bfloat16.svg", "p-float16.svg"}


def test_the_cap_of_a_hidden_size_is_its_own() -> None:
    """It printed the cap of 2048 whatever was asked."""
    asked = ("cap", "--version", "0.33", "--profile", "nvidia-h200-tp2")

    def printed(*hidden: str) -> int:
        return int(run(*asked, *hidden)[0].splitlines()[0])

    caps = [printed(*hidden) for hidden in ((), ("--hidden", "2048"), ("--hidden", "4096"))]
    assert caps == [8 * 2**20, 8 * 2**20, 32 * 2**20]
    assert printed("--hidden", "4096,2048") == 8 * 2**20
    document = json.loads(run(*asked, "--hidden", "4096,2048", "--format", "json")[0])
    assert [(row["hidden_size"], row["cap_bytes"]) for row in document["hidden_sizes"]["rows"]] == [
        (4096, 32 * 2**20), (2048, 8 * 2**20),
    ]  # fmt: skip
    audit = json.loads(run("audit", *asked[1:], "--format", "json")[0])["hidden_sizes"]["rows"]
    assert {row["hidden_size"]: row["cap_bytes"] for row in audit} == {
        2048: 8 * 2**20, 4096: 32 * 2**20,
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
        (("explain", "1K", "--tp", "-2"), 2, "--tp"),
        (("cap", *SEED, "--tp", "3"), 2, "is of 8 ranks"),
        (("tune", "--tp", "4096"), 2, "cannot start that many ranks"),
        (("tune", "--without", "gloo"), 2, "cannot be left out"),
        (("tune", "--hidden", "9" * 5000), 2, "not a list of sizes"),
        (("tune", "--into", "/proc/x"), 3, "cannot keep profiles in /proc/x"),
        (("tune", "--plot", "x.foo"), 2, "expected .svg or .png"),
        (("tune", "--plot", "/nope/x.svg"), 2, "cannot write /nope/x.svg"),
        (("show", *SEED, "--html", "/nope/x.html"), 2, "cannot write /nope/x.html"),
        (("show", *SEED, "--html", "/"), 2, "expected a file"),
        (("show", *SEED, "--plot", "/proc/x.svg"), 3, "cannot write /proc/x.svg"),
        (("decode", "--output", "/nope/x.json"), 2, "cannot write /nope/x.json"),
        (("decode", "--plot", "x.pdf"), 2, "expected .svg or .png"),
        (("decode", "--steps", "0"), 2, "counts out of range"),
        (("decode", "--repeats", "0"), 2, "counts out of range"),
        (("show", "nvidia-h200-tp8", *SEED), 2, "two profiles"),
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


def test_the_doctor_goes_on_when_the_named_profile_is_ill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWISE_PROFILE", "nope")
    out, _ = run("doctor")
    assert "cannot read profile nope" in out
    assert "shm.one_shot" in out


def test_help_teaches_and_names_the_exit_codes() -> None:
    out = " ".join(run("--help")[0].split())
    for word in (
        "tune",
        "bench",
        "show",
        "explain",
        "audit",
        "cap",
        "doctor",
        "130 interrupted",
        *(f"{code} {what}".split(":")[0] for code, what in EXIT_CODES.items()),
    ):
        assert word in out
    assert "torchrun --nproc-per-node 8 -m fusewise tune" in " ".join(
        run("tune", "--help")[0].split()
    )


def test_the_exit_code_of_every_error_is_in_the_table() -> None:
    kinds = [FusewiseError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.exit_code for kind in kinds} | {0, 130} == set(EXIT_CODES)
    assert options.INTERRUPTED in EXIT_CODES


def test_version_and_the_short_help() -> None:
    assert run("--version")[0] == f"fusewise {fusewise.__version__}\n"
    assert run("-h")[0] == run("--help")[0]
    assert run("vllm", "check", "-h")[0] == run("vllm", "check", "--help")[0]
    assert "--show-completion" in run("--help")[0]


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, group
    for name, one in getattr(group, "commands", {}).items():
        yield from commands(one, *names, name)


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("names", ALL, ids=lambda names: " ".join(names) or "fusewise")
def test_help_fits_80_columns_and_never_cuts_an_options_name(names: tuple[str, ...]) -> None:
    out, _ = run(*names, "--help", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "…" not in out
    assert "..." not in out.partition("Commands:")[2], "a command's line says its whole sentence"
    for parameter in ALL[names].params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert not name.startswith("-") or name in out, name


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
