"""The decode run as one rank does it, inside a killable child: build, check, time in turns.

Every arm's logits are compared with the unfused arm's before anything is timed.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fusewise.decode.check import compare
from fusewise.decode.config import DecodeSettings, Phase
from fusewise.decode.models import build_model, shape_named
from fusewise.decode.results import Row
from fusewise.decode.step import Batch, Compiled, DecodeRunner, PrefillRunner
from fusewise.graph.decide import Choice, TokenRange, decide
from fusewise.profiles.bands import Plan
from fusewise.run.communicator import Communicator
from fusewise.shape import Shape

if TYPE_CHECKING:
    from fusewise.ranks.worker import Worker

_COMPILE_S = 900.0  # 48 layers through Inductor, on a cold cache
_BUILD_S = 600.0
_TIME_S = 300.0

Runner = DecodeRunner | PrefillRunner


def decode_rank(worker: Worker, request: dict[str, Any]) -> None:
    """The job: every rank tells all arms' rows as soon as it has those of a size."""
    settings = DecodeSettings(**request["settings"])
    plans = {name: Plan.from_dict(plan) for name, plan in request["plans"].items()}
    if worker.rank:  # all ranks compile the same graphs; rank 0 tells of them
        logging.getLogger("fusewise").setLevel(logging.ERROR)
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # kinds of graphs × one batch and many
    worker.phase("build the model", None, _BUILD_S)
    communicators = _communicators(worker, settings, plans)
    group = next(iter(communicators.values())).group
    positions = settings.context + settings.steps + max((0, *settings.prefill_tokens)) + 8
    shape = shape_named(settings.model, settings.num_layers)
    dtype = getattr(torch, settings.dtype)
    model = build_model(shape, worker.world_size, dtype, positions).to(group.device)
    baseline = next(iter(plans.values())).baseline
    compiled = Compiled(model, group, baseline, settings)
    for done, (phase, tokens) in enumerate(settings.sizes):
        name = f"{phase} {tokens}"
        worker.emit("progress", done=done, planned=len(settings.sizes), op=phase, shape=f"{tokens}")
        worker.phase(f"{name}: compile", None, _COMPILE_S)
        runners = _runners(compiled, phase, tokens, communicators)
        worker.phase(f"{name}: check", None, _TIME_S)
        differences, rounding = compare(model, runners)
        times_s = _times(worker, name, runners, settings.repeats)
        rows = [
            _row(runner, arm, phase, tokens, settings)
            | {
                "times_s": times_s[arm],
                "logits_difference": differences[arm],
                "rounding_difference": rounding,
            }
            for arm, runner in runners.items()
        ]
        sites = {
            choice: [str(site).strip() for site in fusion.sites]
            for choice, fusion in compiled.passes.items()
        }
        worker.emit("measured", rows=rows, sites=sites)
        del runners
        gc.collect()  # caches and captured graphs of this size, before the next takes its own
    for communicator in communicators.values():
        communicator.close()


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


def _runners(
    compiled: Compiled, phase: Phase, tokens: int, communicators: Mapping[str, Communicator]
) -> dict[str, Runner]:
    """One runner per arm, all on the same tokens and the same cache."""
    settings = compiled.settings
    runners: dict[str, Runner] = {}
    batch = Batch(compiled, tokens) if phase == "decode" else None
    for arm, communicator in communicators.items():
        choice = _choice(communicator, settings, tokens)
        if batch is not None:
            runners[arm] = DecodeRunner(compiled, batch, choice, communicator)
        else:
            runners[arm] = PrefillRunner(compiled, tokens, choice, communicator)
    return runners


def _times(
    worker: Worker, name: str, runners: Mapping[str, Runner], repeats: int
) -> dict[str, list[float]]:
    """Seconds per round and arm, the slowest rank's; every round has an order of its own."""
    arms = list(runners)
    mine: dict[str, list[float]] = {arm: [] for arm in arms}
    group = runners[arms[0]].communicator.group
    shuffled = random.Random(repeats)  # the same on all ranks
    for repeat in range(repeats):
        worker.phase(f"{name}: round {repeat + 1} of {repeats}", None, _TIME_S)
        for arm in shuffled.sample(arms, len(arms)):  # nobody always follows the same other
            group.barrier("round")
            mine[arm].append(runners[arm].time_s())
    everyone = group.gather("times", mine)
    return {
        arm: [round(max(rank[arm][i] for rank in everyone), 6) for i in range(repeats)]
        for arm in arms
    }


def _row(runner: Runner, arm: str, phase: Phase, tokens: int, settings: DecodeSettings) -> Row:
    shape = Shape(tokens, settings.hidden_size, settings.dtype)
    return {
        "phase": phase,
        "tokens": tokens,
        "message_bytes": shape.message_bytes,
        "arm": arm,
        "path": runner.communicator.decide("all_reduce_rms_norm", shape).path,
        "graph": _choice(runner.communicator, settings, tokens),
        "tokens_per_run": tokens * (settings.steps if phase == "decode" else 1),
    }
