"""CPU time from start to end of the commands that must not import torch.

    python benchmarks/startup.py

Prints the least and the median of the rounds, in seconds of CPU (user and system).
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

ROUNDS = 15
COMMANDS = (
    "show nvidia-h200-tp8",
    "explain 256K --profile nvidia-h200-tp8",
    "audit --engine vllm --version 0.33 --profile nvidia-h200-tp8",
    "cap --engine vllm --profile nvidia-h200-tp8",
)


def cpu_s(command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "fusewise", *command.split()]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    for command in COMMANDS:
        spent = [cpu_s(command) for _ in range(ROUNDS)]
        print(f"{min(spent):.2f} {statistics.median(spent):.2f}  fusewise {command}")


if __name__ == "__main__":
    main()
