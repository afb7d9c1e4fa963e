"""What a decode run does. Checked once, here; knows no torch, so the command line can build it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusewise.decode.models import shape_named
from fusewise.errors import InputError
from fusewise.shape import DType, Shape
from fusewise.tune.settings import MIN_ROUNDS

Compiler = Literal["inductor", "interpreted"]
Phase = Literal["decode", "prefill"]

BATCHES = (1, 8, 64, 96, 128)  # those of vLLM issue 44079's table, and small ones
GPU_PREFILL = (2048, 8192, 16384)
STEPS, REPEATS = 256, 6  # as in that table
# Two CPU cores take some 20 ms per step of the tiny model; this keeps the run under two minutes.
CPU_STEPS = 8


@dataclass(frozen=True)
class DecodeSettings:
    """One run.

    Args:
        model: a name in ``models.SHAPES``.
        num_layers: None for all of the model's.
        dtype: of weights and activations.
        batches: sequences decoded at once.
        prefill_tokens: lengths of one sequence computed at once.
        steps: decode steps per timing.
        repeats: timings per arm, interleaved.
        context: tokens already in the cache when decoding starts.
        compiler: ``inductor``, or ``interpreted`` where generating code takes longer than the run.
        timeout_s: bound of every wait between ranks.

    Raises:
        InputError: a value out of range, or an unknown model.
    """

    model: str
    num_layers: int | None
    dtype: DType
    batches: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    steps: int
    repeats: int
    context: int
    compiler: Compiler
    timeout_s: float = 600.0  # ranks compile at different speeds

    def __post_init__(self) -> None:
        for name in ("batches", "prefill_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        shape_named(self.model, self.num_layers)
        sizes = (*self.batches, *self.prefill_tokens)
        if not sizes or any(not 1 <= size <= 2**20 for size in sizes):
            raise InputError(
                "batch or prefill size out of range", expected="1 to 1M", got=str(sizes)
            )
        counts = {"steps": self.steps, "context": self.context}
        if any(not 1 <= count <= 10**6 for count in counts.values()):
            raise InputError("counts out of range", expected="1 to 1000000", got=str(counts))
        if not MIN_ROUNDS <= self.repeats <= 1001:
            expected = f"{MIN_ROUNDS} to 1001, for an interval"
            raise InputError("repeats out of range", expected=expected, got=str(self.repeats))

    @property
    def sizes(self) -> list[tuple[Phase, int]]:
        """Every batch and every prefill length, in the order they are measured."""
        decode: list[tuple[Phase, int]] = [("decode", batch) for batch in self.batches]
        return decode + [("prefill", tokens) for tokens in self.prefill_tokens]

    @property
    def hidden_size(self) -> int:
        """Of the model."""
        return shape_named(self.model).hidden_size

    @property
    def messages(self) -> list[Shape]:
        """Every all-reduce's shape in this run, in ascending size."""
        tokens = sorted({*self.batches, *self.prefill_tokens})
        return [Shape(count, self.hidden_size, self.dtype) for count in tokens]
