"""``fusewise.compile`` and ``fusewise.fusion_pass``: the public side of the graph pass."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from fusewise.errors import InputError, UnavailableError
from fusewise.graph.fusion_pass import FusionPass
from fusewise.graph.inductor import options_with, require
from fusewise.run.communicator import Communicator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fusewise.profiles.schema import Profile

Model = TypeVar("Model", bound=Callable[..., Any])


def fusion_pass(
    group: ProcessGroup | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    *,
    communicator: Communicator | None = None,
    group_names: Collection[str] = (),
) -> FusionPass:
    """A pass for people who own their ``torch.compile`` call.

    Use it as ``torch.compile(model, options={"post_grad_custom_pre_pass": fusion_pass()})``.
    Collective unless a communicator is given.

    Args:
        group: the tensor-parallel group; None for the default group.
        profile: as for ``Communicator``.
        communicator: one that exists already; then ``group`` and ``profile`` must be None.
        group_names: further names of the group, as engines' own operators use them. Groups of
            the same ranks that exist by now, such as a device mesh's, are known anyway.

    Raises:
        InputError: a communicator and a group or profile were given.
        UnavailableError: this torch has no custom graph passes as we know them, or no process
            group is initialised.
    """
    require()
    if communicator is not None and (group is not None or profile is not None):
        raise InputError("a communicator already has its group and its profile", got="both")
    used = communicator or Communicator(group, profile)
    return FusionPass(
        used.group.name,
        used.plans,
        group_names={*group_names, *names_of(used.group.ranks)},
        device_type=used.group.device.type,
        communicator=used,
    )


def names_of(ranks: list[int]) -> set[str]:
    """torch's names of every process group that has exactly these ranks, in this order.

    A device mesh makes groups of its own; an all-reduce over the same ranks is the same.
    """
    groups = dist.distributed_c10d._world.pg_names
    return {str(name) for group, name in groups.items() if _ranks(group) == ranks}


def _ranks(group: ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group) if dist.get_rank(group) >= 0 else []


def compile(
    model: Model,
    *,
    group: ProcessGroup | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    fusion: FusionPass | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    **torch_compile: Any,
) -> Model:
    """``torch.compile`` with the fusion pass: same model, same call, same results.

    Collective unless ``fusion`` is given. Where this torch's Inductor is unknown the model is
    compiled without the pass, and one warning says so.

    Args:
        model: a module or function that all-reduces over ``group``; inference only.
        group, profile: as for ``fusion_pass``.
        fusion: a pass made before, for its ``explain()`` or for several models.
        mode, dynamic, options: as for ``torch.compile``; here mode and options may come together.
        torch_compile: further arguments of ``torch.compile``, such as ``fullgraph``.

    Raises:
        InputError: ``fusion`` together with a group or profile.
    """
    if fusion is not None and (group is not None or profile is not None):
        raise InputError("the pass already has its group and its profile", got="both")
    chosen: dict[str, Any] = {}
    if mode is not None and mode != "default":
        from torch._inductor import list_mode_options

        chosen |= list_mode_options(mode, dynamic)
    chosen |= options or {}
    try:
        require()
        chosen = options_with(fusion or fusion_pass(group, profile), chosen)
    except UnavailableError as refused:
        warnings.warn(f"compiled without fusewise: {refused}", RuntimeWarning, stacklevel=2)
    return torch.compile(  # type: ignore[return-value]
        model, dynamic=dynamic, options=chosen or None, **torch_compile
    )
