"""What helps to find a fault: a communicator in one line, and calls compared between ranks.

``FUSEWISE_DEBUG=1``: before every call all ranks compare what they were called with.

Ranks that call different operations, or one with different shapes, wait for each other in a kernel
until its bound, or reduce what does not belong together. This turns that into an error that names
them, at the price of a round through the store per call. Never changes a result.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fusewise.profiles.variables import switched_on

if TYPE_CHECKING:
    from fusewise.run.communicator import Communicator

SWITCH = "FUSEWISE_DEBUG"
# What every call comes through, eager or from a graph, and what errors call it.
_COMPARED = {
    "all_reduce": "all_reduce",
    "untraced_norm": "all_reduce_rms_norm",
    "quantised_norm": "all_reduce_rms_norm with fp8",
}
Call = TypeVar("Call", bound=Callable[..., Any])


def described(communicator: Communicator) -> str:
    """Its ranks, where its plans come from, and each plan by the head of its digest."""
    plans = [
        f"{dtype} plan {plan.digest[:8]} ({plan.source})"
        for dtype, plan in communicator.plans.items()
        if plan.tables
    ]
    what = ", ".join(plans) or "no plan"
    return f"<Communicator, {communicator.group}: {communicator.source}; {what}>"


def compare_calls(communicator: Communicator, environ: Mapping[str, str] = os.environ) -> None:
    """Makes a communicator's calls compare themselves, where the switch is on. Collective.

    Raises:
        InputError: the switch is neither 0 nor 1.
        DisagreementError: it is on for some ranks only; then the others would wait for ever.
    """
    on = switched_on(SWITCH, environ)
    communicator.group.agree(SWITCH, on)
    if on and communicator.group.world_size > 1:
        for name, shown in _COMPARED.items():
            call = _compared(communicator, shown, getattr(communicator, name))
            setattr(communicator, name, call)


def _compared(communicator: Communicator, shown: str, call: Call) -> Call:
    names = list(inspect.signature(call).parameters)

    @functools.wraps(call)
    def run(*given: Any, **named: Any) -> Any:
        if not torch.compiler.is_compiling():  # a graph's operators come here when they run
            arguments = dict(zip(names, given, strict=False)) | named
            told = [shown, *(f"{name}={_told(value)}" for name, value in arguments.items())]
            communicator.group.agree("a call (FUSEWISE_DEBUG=1)", told)
        return call(*given, **named)

    return run  # type: ignore[return-value]


def _told(value: Any) -> str:
    """``[64, 2048] bfloat16`` of a tensor; a number as it is."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return str(value)
