"""A few calls of the shipped kernels by virtual ranks, to be run under compute-sanitizer.

    compute-sanitizer --tool racecheck --kernel-name kernel_substring=fusewise \\
        python benchmarks/sanitize.py

Every strategy, 2, 4 and 8 ranks, dtype and kind of output once, at shapes that leave tails.
"""

from __future__ import annotations

import sys

from fusewise.shape import Shape
from tests.gpu.test_virtual_ranks import CASES, Ranks

POINTS = (
    (Shape(2, 2880, "bfloat16"), "kNorm"),
    (Shape(3, 264, "float16"), "kSum"),
    (Shape(1, 2048, "float32"), "kNorm"),
    (Shape(2, 2048, "bfloat16"), "kStaticFp8"),
    (Shape(1, 2880, "bfloat16"), "kTokenFp8"),
    (Shape(2, 2048, "bfloat16"), "kGroupFp8"),
)
TIMEOUT_S = 200.0  # a checked kernel is a thousand times slower, and every rank waits for it


def main() -> None:
    cases = CASES[:: int(sys.argv[1]) if len(sys.argv) > 1 else 1]
    for strategy, world_size in cases:
        ranks = Ranks(strategy, world_size, timeout_s=TIMEOUT_S)
        for shape, output in POINTS:
            call = ranks.call(shape, output)
            for _ in range(2):
                call.poison()
                call.run()
                call.check()
        assert ranks.is_idle()
        print(f"{strategy} of {world_size}: {len(POINTS)} shapes right", flush=True)


if __name__ == "__main__":
    main()
