"""The cap inside vLLM: decided where the config is built, carried by it to the workers.

``apply`` runs just before vLLM turns its cap into a compile-range endpoint. It sets one field that
the user left alone; where vLLM's plain FlashInfer all-reduce reads the table instead of the field,
each worker lowers its own copy of the table. Nothing else of vLLM is changed.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from dataclasses import dataclass
from typing import Any

from fusewise.engines.cap import CapDecision, decide_cap
from fusewise.engines.plugin import explicit_cap, mode, probe_apart
from fusewise.engines.vllm.dispatch import VllmSettings, field_mb
from fusewise.engines.vllm.engine import settings_on
from fusewise.engines.vllm.router import full_cap
from fusewise.engines.vllm.seams import MARK, TABLE_SEAM, resolve
from fusewise.errors import FusewiseError
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import Level, find_profile
from fusewise.shape import DType, format_size, parse_dtype

log = logging.getLogger("vllm.plugins.fusewise")


@dataclass(frozen=True)
class Answer:
    """What to set, and the words for the log."""

    cap_bytes: int
    why: str
    source: str
    mode: str


def around_set_compile_ranges(original: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """``VllmConfig._set_compile_ranges`` with our cap in place; never fails on our account.

    The mode is read anew: engines of one process may differ in it.
    """
    try:
        switch = mode("vllm", os.environ)
        if switch != "off":
            apply(config, switch)
    except Exception as error:
        log.warning("fusewise leaves vLLM's fusion cap as it is: %s", error)
    return original(config, *args, **kwargs)


def apply(config: Any, switch: str) -> None:
    """Sets the cap on a ``VllmConfig`` whose user has not, and says so in one line.

    Does nothing at tensor-parallel size 1, without the fusion, or when it was here before.
    """
    passes = config.compilation_config.pass_config
    world_size = config.parallel_config.tensor_parallel_size
    if world_size < 2 or not passes.fuse_allreduce_rms or getattr(passes, MARK, None):
        return
    if passes.fi_allreduce_fusion_max_size_mb is not None:
        log.info(
            "fusewise: the fusion cap of %s MB was set explicitly and stays",
            passes.fi_allreduce_fusion_max_size_mb,
        )
        return
    old = passes.flashinfer_max_size(world_size)
    if old is None:
        return  # vLLM does not fuse on this GPU at this world size
    dtype = parse_dtype(str(config.model_config.dtype)) if config.model_config else "bfloat16"
    hidden_size = config.model_config.get_hidden_size() if config.model_config else None
    custom = not config.parallel_config.disable_custom_all_reduce
    answer = answer_here(world_size, dtype, hidden_size, switch, old, custom_all_reduce=custom)
    row_bytes = hidden_size * config.model_config.dtype.itemsize if hidden_size else 1
    if answer.cap_bytes < row_bytes:
        passes.fuse_allreduce_rms = False  # an endpoint of 0 tokens is none vLLM accepts
    elif answer.cap_bytes != old:
        passes.fi_allreduce_fusion_max_size_mb = field_mb(answer.cap_bytes)
    setattr(passes, MARK, {"mode": answer.mode, "cap_mb": field_mb(answer.cap_bytes)})
    log.info("fusewise: fusion cap %s: %s; %s", _change(old, answer), answer.why, answer.source)


def _change(old: int, answer: Answer) -> str:
    if answer.cap_bytes == old:
        return f"stays {format_size(old)} ({answer.mode})"
    new = format_size(answer.cap_bytes) if answer.cap_bytes else "nothing fused"
    return f"{format_size(old)} -> {new} ({answer.mode})"


def answer_here(
    world_size: int,
    dtype: DType,
    hidden_size: int | None,
    switch: str,
    live_cap: int,
    *,
    custom_all_reduce: bool,
) -> Answer:
    """The cap for the installed vLLM on this node.

    Args:
        world_size: tensor-parallel size.
        dtype: the model's.
        hidden_size: the model's, or None.
        switch: ``cap`` or ``full``.
        live_cap: what this vLLM's own table says, bytes.
        custom_all_reduce: False with ``--disable-custom-all-reduce``.

    Raises:
        FusewiseError: an unknown version, a node vLLM does not fuse on, or a table that is not
            the one this package knows.
    """
    version = importlib.metadata.version("vllm")
    node = probe_apart(world_size)
    flags = {"custom_all_reduce": custom_all_reduce}
    settings = settings_on(version, node, dtype, os.environ, flags)
    if settings.cap_bytes() != live_cap:
        raise FusewiseError(
            f"the fusion table of vLLM {version} is not the one known here",
            expected=str(settings.cap_bytes()),
            got=str(live_cap),
        )
    profile: Profile | None = None
    level: Level = "engine default"
    try:
        found = find_profile(node, dtype)
        profile, level, notes = found.profile, found.level, found.notes
        where = found.where if profile is None else f"{level} {found.where}"
    except FusewiseError as error:
        notes, where = (str(error),), "the profile asked for cannot be used"
    for note in notes:
        log.warning("fusewise: %s", note)
    decision = decide_cap(
        profile,
        settings,
        explicit=explicit_cap(os.environ),
        profile_level=level,
        hidden_size=hidden_size,
    )
    return _answer(decision, profile, settings, switch, hidden_size, where)


def _answer(
    decision: CapDecision,
    profile: Profile | None,
    settings: VllmSettings,
    switch: str,
    hidden_size: int | None,
    where: str,
) -> Answer:
    from_profile = decision.origin in ("measured", "published")
    source = where if from_profile else f"by {decision.level}, {where}"
    if switch == "full" and decision.origin != "explicit":
        wide = full_cap(profile, settings, hidden_size)
        if wide is not None:
            why = "the plan chooses kernel by kernel up to there"
            return Answer(wide, why, where, "full")
        source += "; full needs a profile of this node with a native kernel in it"
    assert decision.cap_bytes is not None  # the live cap was not None, and equals the table's
    return Answer(decision.cap_bytes, decision.why, source, "cap")


def lower_table(config: Any) -> None:
    """In a worker: the fusion table ends at our cap, for whatever reads it and not the field."""
    mark = getattr(config.compilation_config.pass_config, MARK, None)
    if mark is None or mark["mode"] != "cap":
        return
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    row = resolve(TABLE_SEAM).get(capability.to_int(), {})
    world_size = config.parallel_config.tensor_parallel_size
    if row.get(world_size, 0) > mark["cap_mb"]:
        row[world_size] = mark["cap_mb"]
