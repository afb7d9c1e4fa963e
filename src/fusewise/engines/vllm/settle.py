"""In a worker: what the config says takes hold on all ranks of the tensor-parallel group, or none.

The ranks agree before vLLM builds its all-reduces; a rank without the plugin, with another config
or out of time leaves all as the configs have it, within seconds. Then the table is lowered, and,
where every rank built a config of its own, the cap is set. Full mode is ``takeover.py``'s business.
"""

from __future__ import annotations

import inspect
from typing import Any

from fusewise.engines.vllm import mark as marks
from fusewise.engines.vllm.mark import Mark
from fusewise.engines.vllm.seams import TABLE_SEAM, resolve

# Ranks come here within moments of each other, from the collective that made their group.
TIMEOUT_S = 20.0

_lowered: dict[tuple[int, int], float] = {}  # what stood in the table: capability, world size


def tensor_parallel_group(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's group, of the arguments of ``CudaCommunicator.__init__``; None where not ours."""
    given = inspect.signature(original).bind(None, *args, **kwargs).arguments
    if str(given.get("unique_name", "")).split(":")[0] != "tp":
        return None
    device_group = given.get("device_group")
    return given["cpu_group"] if device_group is None else device_group


def agree(process_group: Any) -> tuple[Any, Mark] | None:
    """Before vLLM builds a tensor-parallel group's communicator: its config, and the mark in force.

    None: there is nothing to agree on.

    Raises:
        FusewiseError: the ranks do not agree; all stay as their configs have it.
    """
    from vllm.config.vllm import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:
        return None
    mark = marks.read(config)
    if mark is None:
        marks.write(config, Mark())  # a front end without the plugin: nobody decides after it
        return None
    if not mark.asks_workers:
        return None
    return config, settled(process_group, config, mark)


def settled(process_group: Any, config: Any, mark: Mark) -> Mark:
    """The mark, in force on all ranks.

    Raises:
        FusewiseError: not on all, so on none.
    """
    from fusewise.ranks.group import Group

    group = Group(process_group, timeout_s=TIMEOUT_S)
    row: tuple[int, dict[int, float]] | None = None
    fault: Exception | None = None
    try:
        row = _row() if mark.table and mark.mode != "none" else None
    except Exception as error:  # whatever it is, the peers must hear it
        fault = error
    group.unanimous("vLLM's fusion cap", mark.proposal, fault or mark.fault)
    if mark.alone and mark.cap_mb is not None:
        marks.set_fusion_again(config, mark, mark.cap_mb)
    if row is not None and mark.cap_mb is not None:
        _lower(row, group.world_size, mark.cap_mb)
    return mark


def _row() -> tuple[int, dict[int, float]]:
    """This GPU's capability and its row of the fusion table."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability().to_int()
    return capability, resolve(TABLE_SEAM).get(capability, {})


def _lower(row: tuple[int, dict[int, float]], world_size: int, cap_mb: float) -> None:
    capability, sizes = row
    before = sizes.get(world_size, 0)
    if before > cap_mb:
        _lowered.setdefault((capability, world_size), before)
        sizes[world_size] = cap_mb


def restore_table() -> None:
    """The table as vLLM has it: for the next engine of this process, which asks anew."""
    while _lowered:
        (capability, world_size), size_mb = _lowered.popitem()
        resolve(TABLE_SEAM)[capability][world_size] = size_mb
