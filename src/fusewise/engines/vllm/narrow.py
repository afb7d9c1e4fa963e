"""The cap inside vLLM: decided once, where the config is built, and marked on it.

Runs just before vLLM turns its cap into a compile-range endpoint. It sets one field that the user
left alone; what else reads the size reads vLLM's table, which each worker lowers for itself once
all ranks agree (``settle.py``). Nothing else of vLLM is changed. Workers decide nothing: whatever
came out here, also that nothing did, is on the config that reaches them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from dataclasses import replace
from typing import Any

from fusewise.engines.cap import CapDecision, decide_cap
from fusewise.engines.plugin import (
    Found,
    explicit_cap,
    mode,
    probe_apart,
    profile_here,
    torch_multicast_apart,
)
from fusewise.engines.router import full_cap
from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm import settle
from fusewise.engines.vllm.dispatch import VllmSettings, field_mb
from fusewise.engines.vllm.engine import plain_flashinfer_is_on, settings_on
from fusewise.engines.vllm.mark import Mark
from fusewise.engines.vllm.tables import known_version, tables_of
from fusewise.errors import FusewiseError
from fusewise.shape import format_size, parse_dtype

log = logging.getLogger("vllm.plugins.fusewise")


def around_set_compile_ranges(original: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """``VllmConfig._set_compile_ranges`` with our cap in place; never fails on our account."""
    try:
        decide_once(config)
    except Exception as error:
        log.warning("fusewise leaves vLLM's fusion cap as it is: %s", error)
    return original(config, *args, **kwargs)


def decide_once(config: Any) -> None:
    """Decides about a ``VllmConfig``, unless somebody did, and says so in one line.

    The mode is read anew: engines of one process may differ in it. A fault is marked like an
    answer: a config rebuilt from this one, here or in a worker, is left alone.
    """
    if marks.read(config) is not None:
        return
    alone = _each_rank_for_itself(config.parallel_config.distributed_executor_backend)
    endpoints = config.compilation_config.compile_ranges_endpoints
    mark = Mark()
    try:
        switch = mode("vllm", os.environ)
        if switch != "off" and config.parallel_config.tensor_parallel_size > 1:
            mark = replace(_decided(config, switch), alone=alone, endpoints=endpoints)
    except Exception as error:
        mark = Mark(alone=alone, fault=str(error))
        raise
    finally:
        marks.write(config, mark)
    if mark.cap_mb is not None and not alone:
        marks.set_fusion(config, mark, mark.cap_mb)


def _decided(config: Any, switch: str) -> Mark:
    """What to do about this config: nothing, without a word, where vLLM does not fuse.

    Raises:
        FusewiseError: a version, a switch or a node that cannot be judged, or a table that is not
            the one this package knows.
    """
    passes, world_size = config.compilation_config.pass_config, _world_size(config)
    if passes.fi_allreduce_fusion_max_size_mb is not None:
        size_mb = passes.fi_allreduce_fusion_max_size_mb
        log.info("fusewise: the fusion cap of %s MB was set explicitly and stays", size_mb)
        return Mark()
    settle.restore_table()  # an engine before this one, in this process, may have lowered it
    old = passes.flashinfer_max_size(world_size)
    version, warning = known_version(importlib.metadata.version("vllm"))
    tables = tables_of(version)
    fuses = bool(passes.fuse_allreduce_rms)
    others = tables.hand_fused or plain_flashinfer_is_on(tables, os.environ)
    if old is None or not (fuses or others):
        return Mark()  # no fusion on this GPU at this world size, or nobody who reads its size
    settings, found = _settings_here(config, version)
    if settings is None or settings.threshold is None:
        return Mark()
    if warning:
        log.warning("fusewise: %s", warning)
    if settings.cap_bytes() != old:
        raise FusewiseError(
            f"the fusion table of vLLM {version} is not the one known here",
            expected=str(settings.cap_bytes()),
            got=str(old),
        )
    hidden_size = config.model_config.get_hidden_size() if config.model_config else None
    decision = decide_cap(
        found.profile,
        settings,
        explicit=explicit_cap(os.environ),
        profile_level=found.level,
        hidden_size=hidden_size,
    )
    mark, words = _answer(decision, found, settings, switch if fuses else "cap", hidden_size)
    if mark.mode == "full" and _quantised(config):
        # vLLM's patterns with quantisation run FlashInfer's kernel whatever the plan says.
        mark, words = replace(mark, wide_mb=None), f"{words}; no further, the model is quantised"
    log.info("fusewise: fusion cap %s: %s", _change(old, mark, fuses), words)
    table = settings.table_read_elsewhere and mark.cap_bytes < old
    return replace(mark, fuses=fuses, table=table)


def _each_rank_for_itself(backend: Any) -> bool:
    """Whether every rank builds a config, by the executor's name or class."""
    name = getattr(backend, "__name__", backend)
    return name in ("external_launcher", "ExecutorWithExternalLauncher")


def _world_size(config: Any) -> int:
    return int(config.parallel_config.tensor_parallel_size)


def _quantised(config: Any) -> bool:
    return getattr(config.model_config, "quantization", None) is not None


def _change(old: int, mark: Mark, fuses: bool) -> str:
    cap = mark.cap_bytes
    told = mark.mode if fuses else f"{mark.mode}; the pass is off, others read its table"
    if mark.wide_mb:
        told += f", {format_size(marks.in_bytes(mark.wide_mb))} once its kernels are up"
    if cap == old:
        return f"stays {format_size(old)} ({told})"
    return f"{format_size(old)} -> {format_size(cap) if cap else 'nothing fused'} ({told})"


def _settings_here(config: Any, version: str) -> tuple[VllmSettings | None, Found]:
    """This vLLM on this node, and the node's profile; no settings without FlashInfer."""
    node = probe_apart(_world_size(config))
    if node.flashinfer is None:
        return None, Found()
    dtype = parse_dtype(str(config.model_config.dtype)) if config.model_config else "bfloat16"
    flags = {
        "custom_all_reduce": not config.parallel_config.disable_custom_all_reduce,
        "multicast": torch_multicast_apart(node.world_size),
    }
    settings = settings_on(version, node, dtype, os.environ, flags)
    return settings, profile_here(node, dtype, log)


def _answer(
    decision: CapDecision,
    found: Found,
    settings: VllmSettings,
    switch: str,
    hidden_size: int | None,
) -> tuple[Mark, str]:
    assert decision.cap_bytes is not None  # there is a threshold, so there is a cap
    source = found.source(decision)
    mark = Mark("cap", cap_mb=field_mb(decision.cap_bytes))
    if switch == "full" and decision.origin != "explicit":
        wide = full_cap(found.profile, settings, hidden_size)
        if wide is not None:
            wide_mb = field_mb(max(wide, decision.cap_bytes))
            mark = replace(mark, mode="full", wide_mb=wide_mb)
        else:
            source += "; full needs a profile of this node with a native kernel in it"
    return mark, f"{decision.why}; {source}"
