"""The decode run as one rank does it, inside a killable child: build, check, time in turns.

Every arm's logits are compared with the unfused arm's before anything is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fusewise.bands import Plan
from fusewise.communicator import Communicator
from fusewise.decode.models import build_model, shape_named
from fusewise.decode.settings import DecodeSettings
from fusewise.decode.step import Batch, Compiled, DecodeRunner, PrefillRunner
from fusewise.errors import VerificationError
from fusewise.graph.decide import Choice, TokenRange, decide
from fusewise.shape import Shape

if TYPE_CHECKING:
    from fusewise.worker import Worker

_COMPILE_S = 900.0  # 48 layers through Inductor, on a cold cache
_BUILD_S = 600.0
_TIME_S = 300.0
# Rounding in another order moves logits by percents where many layers add up, and a router of
# experts may flip; what is broken is off by the size of the logits themselves.
_BROKEN = 0.5

Row = dict[str, Any]


def decode_rank(worker: Worker, request: dict[str, Any]) -> dict[str, Any] | None:
    """The job: rows of every arm on rank 0, None elsewhere."""
    settings = DecodeSettings(**request["settings"])
    plans = {name: Plan.from_dict(plan) for name, plan in request["plans"].items()}
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # kinds of graphs × one batch and many
    worker.phase("build the model", None, _BUILD_S)
    dtype = getattr(torch, settings.dtype)
    positions = settings.context + settings.steps + max((0, *settings.prefill_tokens)) + 8
    shape = shape_named(settings.model, settings.num_layers)
    model = build_model(shape, worker.world_size, dtype, positions)
    communicators = _communicators(worker, settings, plans)
    first = next(iter(communicators.values()))
    device = first.group.device
    model.to(device)
    compiled = Compiled(model, first.group.name, first.plans[settings.dtype].baseline, settings)
    rows: list[Row] = []
    for size in settings.batches:
        worker.phase(f"decode at batch {size}: compile", None, _COMPILE_S)
        batch = Batch(compiled, size, device)
        runners = {
            name: DecodeRunner(compiled, batch, _choice(communicator, settings, size), communicator)
            for name, communicator in communicators.items()
        }
        rows += _measure(worker, settings, "decode", size, runners, size * settings.steps)
    for tokens in settings.prefill_tokens:
        worker.phase(f"prefill of {tokens}: compile", None, _COMPILE_S)
        prefills = {
            name: PrefillRunner(
                compiled, tokens, _choice(communicator, settings, tokens), communicator, device
            )
            for name, communicator in communicators.items()
        }
        rows += _measure(worker, settings, "prefill", tokens, prefills, tokens)
    sites = {
        choice: [str(site).strip() for site in fusion.sites]
        for choice, fusion in compiled.passes.items()
    }
    for communicator in communicators.values():
        communicator.close()
    return {"rows": rows, "sites": sites} if worker.rank == 0 else None


def _communicators(
    worker: Worker, settings: DecodeSettings, plans: Mapping[str, Plan]
) -> dict[str, Communicator]:
    """One per arm, over the same ranks."""
    largest = settings.messages[-1]
    made = {}
    for name, plan in plans.items():
        worker.phase(f"communicator for {name}", None, _BUILD_S)
        made[name] = Communicator(
            profile=plan,
            max_message_bytes=max(2**20, largest.message_bytes),
            max_hidden_size=settings.hidden_size,
            timeout_s=settings.timeout_s,
        )
    return made


def _choice(communicator: Communicator, settings: DecodeSettings, tokens: int) -> Choice:
    """What the pass does for an arm where the graph has one size: ``tokens`` rows."""
    plan = communicator.plans[settings.dtype]
    return decide(plan, settings.hidden_size, TokenRange(tokens, tokens), True).choice


def _measure(
    worker: Worker,
    settings: DecodeSettings,
    phase: str,
    tokens: int,
    runners: Mapping[str, DecodeRunner | PrefillRunner],
    tokens_per_run: int,
) -> list[Row]:
    """Times all arms in turns; one row per arm."""
    worker.phase(f"{phase} {tokens}: check", None, _TIME_S)
    differences = _differences(runners)
    names = list(runners)
    mine: dict[str, list[float]] = {name: [] for name in names}
    group = next(iter(runners.values())).communicator.group
    for repeat in range(settings.repeats):
        worker.phase(f"{phase} {tokens}: round {repeat + 1} of {settings.repeats}", None, _TIME_S)
        for k in range(len(names)):
            name = names[(repeat + k) % len(names)]  # nobody always follows the same other
            group.barrier("round")
            mine[name].append(runners[name].time_s())
    everyone = group.gather("times", mine)
    shape = Shape(tokens, settings.hidden_size, settings.dtype)
    rows = []
    for name, runner in runners.items():
        slowest = [max(rank[name][i] for rank in everyone) for i in range(settings.repeats)]
        rows.append(
            {
                "phase": phase,
                "tokens": tokens,
                "message_bytes": shape.message_bytes,
                "arm": name,
                "path": runner.communicator.decide("all_reduce_rms_norm", shape).path,
                "graph": _choice(runner.communicator, settings, tokens),
                "tokens_per_run": tokens_per_run,
                "times_s": [round(time_s, 6) for time_s in slowest],
                "logits_difference": differences[name],
            }
        )
    return rows


def _differences(runners: Mapping[str, DecodeRunner | PrefillRunner]) -> dict[str, float]:
    """Each arm's logits against the first arm's, relative to their size; median over sequences.

    Raises:
        VerificationError: an arm's logits are wrong, not rounded.
    """
    logits = {name: runner.first_logits() for name, runner in runners.items()}
    reference = next(iter(logits.values()))
    scale = reference.abs().amax(-1)
    found: dict[str, float] = {}
    for name, one in logits.items():
        relative = (one - reference).abs().amax(-1) / scale
        found[name] = round(float(relative.median()), 6)
    wrong: Sequence[str] = [name for name, value in found.items() if not value <= _BROKEN]
    if wrong:
        raise VerificationError(
            f"the logits of {', '.join(wrong)} are wrong",
            expected=f"those of the unfused model within {_BROKEN:.0%}",
            got=", ".join(f"{found[name]:.0%}" for name in wrong),
        )
    return found
