"""Decode and prefill of the Qwen3-30B-A3B shape on two H200s or more, under all plans.

    python benchmarks/decode_h200.py --layers 16
    python benchmarks/decode_h200.py --tp 8 --profile profile.json --output decode.json

A thin driver of ``fusewise decode``: one profile for all runs, then the comparison with and
without our own kernels, then the ablation in which the fast unfused path is left out. Writes JSON,
and table and plot beside it, to benchmarks/results/ by default. Needs a GPU per rank.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from fusewise.node import gpu_count
from fusewise.operation import backend_of, is_unfused
from fusewise.profiles import store
from fusewise.profiles.plan import derive

RESULTS = Path(__file__).parent / "results"
BATCHES = "1,8,64,96,128,256"
PREFILL = "2048,8192,16384"


def fusewise(*words: str) -> subprocess.CompletedProcess[str]:
    """Its code and the table on stdout; progress goes to this process's stderr."""
    command = [sys.executable, "-m", "fusewise", *words]
    return subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)


def left_out(profile: str) -> list[str]:
    """Our own kernels, and every fast unfused backend that the plan uses somewhere."""
    measured = store.load(profile)
    providers = {path.provider for path in measured.paths}
    unfused = {p for p in derive(measured).paths() if is_unfused(p)}
    fast = {backend_of(path) for path in unfused - {measured.baseline}}
    return [*(["native"] if "native" in providers else []), *sorted(fast)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of 48; the JSON says how many")
    parser.add_argument("--profile", help="a profile of this node; measured first by default")
    parser.add_argument("--tp", type=int, default=2, help="ranks")
    parser.add_argument("--steps", default="256")
    parser.add_argument("--output", type=Path, help="the JSON to write")
    arguments = parser.parse_args()
    tp, profile = arguments.tp, arguments.profile
    output = arguments.output or RESULTS / f"decode_h200x{tp}.json"
    if gpu_count() < tp:
        print(f"decode_h200: needs {tp} GPUs", file=sys.stderr)
        return 3
    if profile is None:
        fusewise(
            "tune", "--tp", str(tp), "--hidden", "2048", "--into", str(RESULTS)
        ).check_returncode()
        profile = str(max(RESULTS.glob(f"device=*tp={tp},*.json"), key=lambda p: p.stat().st_mtime))
    names = left_out(profile)
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # timeout tells decode too, which keeps what it has
    decode = fusewise(
        "decode", "--model", "qwen3-30b-a3b", "--layers", str(arguments.layers), "--tp", str(tp),
        "--batches", BATCHES, "--prefill", PREFILL, "--steps", arguments.steps,
        "--profile", profile, *(word for name in names for word in ("--without", name)),
        "--output", str(output), "--plot", str(output.with_suffix(".svg")), "--format", "md",
    )  # fmt: skip
    if decode.stdout:
        output.with_suffix(".md").write_text(decode.stdout)
    print(decode.stdout, end="")
    return decode.returncode


if __name__ == "__main__":
    sys.exit(main())
