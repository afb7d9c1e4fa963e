"""Whether arms compute the same: their logits, against what rounding alone does to them.

Sums in another order move logits by percents where many layers add up, and by half their size where
a router's experts flip. The model itself says how far: the unfused arm runs again with the last bit
of every embedding flipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fusewise.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

_SEQUENCES = 8  # at least, for the median: of a single one, experts flip or do not
# What is off by more than this many times rounding's own effect, or a tenth where that is next to
# nothing, is wrong: on two H200s arms were off by up to 1.1 times it, 0.28 of the logits' size
# (benchmarks/results/two_gpus/decode_tp2.json). By half their size it is wrong whatever rounding
# does: logits that have nothing to do with each other differ by more than their size.
_TIMES_ROUNDING, _LEAST, _MOST = 2.0, 0.1, 0.5
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


class Runner(Protocol):
    """An arm, ready to run."""

    def first_logits(self, turn: int) -> Tensor:
        """[sequences, vocabulary]; other sequences each turn, the same in all arms."""
        ...


def compare(model: Any, arms: Mapping[str, Runner]) -> tuple[dict[str, float], float]:
    """How far each arm is off the first, and how far rounding moves that one.

    Raises:
        VerificationError: an arm's logits are wrong, not rounded.
    """
    logits = {name: _logits(arm) for name, arm in arms.items()}
    first = next(iter(arms))
    with nudged(model):
        rounded = _logits(arms[first])
    differences = {name: difference(one, logits[first]) for name, one in logits.items()}
    rounding = difference(rounded, logits[first])
    confirm(differences, rounding)
    return differences, rounding


def _logits(arm: Runner) -> Tensor:
    """[``_SEQUENCES`` or more, vocabulary]."""
    found = [arm.first_logits(0)]
    while sum(map(len, found)) < _SEQUENCES:
        found.append(arm.first_logits(len(found)))
    return torch.cat(found)


@contextmanager
def nudged(model: Any) -> Iterator[None]:
    """The last bit of every embedding flipped meanwhile, on all ranks alike."""
    weight: Tensor = model.get_input_embeddings().weight
    bits = weight.view(_INTEGERS[weight.element_size()])
    bits.bitwise_xor_(1)
    try:
        yield
    finally:
        bits.bitwise_xor_(1)


def difference(logits: Tensor, reference: Tensor) -> float:
    """How far logits [sequences, vocabulary] are off, of their size: the median sequence.

    Of an even number the upper one: half of them wrong is wrong.
    """
    relative = (logits - reference).abs().amax(-1) / reference.abs().amax(-1)
    return float(f"{relative.sort().values[len(relative) // 2]:.4g}")


def confirm(differences: Mapping[str, float], rounding: float) -> None:
    """Every arm is as close to the unfused one as rounding leaves it.

    Args:
        differences: of each arm, as ``difference`` gives them.
        rounding: of the unfused arm with nudged embeddings.

    Raises:
        VerificationError: an arm's logits are wrong, not rounded.
    """
    most = min(max(_TIMES_ROUNDING * rounding, _LEAST), _MOST)
    wrong = [name for name, value in differences.items() if not value <= most]
    if wrong:
        raise VerificationError(
            f"the logits of {', '.join(wrong)} are wrong",
            expected=f"those of the unfused model within {most:.0%}; its own rounding moves them "
            f"by {rounding:.1%}",
            got=", ".join(f"{differences[name]:.0%}" for name in wrong),
        )
