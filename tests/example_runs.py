"""Runs README's Python example as printed, many times over, and counts the clean ends.

    python -m tests.example_runs 50    # 50 without a profile, 50 with one measured first

An abort while the interpreter ends is a race: one clean run shows little, fifty do.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
TIMEOUT_S = 100  # a run takes about 7 s on two cores
_TUNE = ("tune", "--tp", "2", "--hidden", "2048", "--max-bytes", "512K", "--budget", "20s")


def example() -> str:
    """The Python block of the README."""
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return str(source)


def torchrun_words(folder: Path) -> tuple[str, ...]:
    """What torchrun is told; the example is written into ``folder``."""
    script = folder / "example.py"
    script.write_text(example())
    return "--standalone", "--nproc-per-node", "2", str(script)


def environment(folder: Path) -> dict[str, str]:
    """``folder`` is where profiles are looked for."""
    return os.environ | {"FUSEWISE_HOME": str(folder), "OMP_NUM_THREADS": "1"}


def _python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=environment(folder),
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def main(runs: int) -> int:
    """Counts exit codes without and with a profile; 0 when every run ended with 0."""
    failed = 0
    for profile in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if profile:
                _python(folder, "-m", "fusewise", *_TUNE).check_returncode()
            words = ("-m", "torch.distributed.run", *torchrun_words(folder))
            codes = collections.Counter(_python(folder, *words).returncode for _ in range(runs))
        print(f"{'with' if profile else 'without'} a profile: {codes[0]} of {runs} ended with 0",
              dict(codes), flush=True)  # fmt: skip
        failed += runs - codes[0]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
