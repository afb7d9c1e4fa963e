"""``fusewise.compile`` and ``fusewise.fusion_pass``: the public side of the graph pass."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from fusewise.errors import InputError, UnavailableError
from fusewise.graph.fusion_pass import FusionPass
from fusewise.graph.inductor import InductorBackend, mode_options, require
from fusewise.run.communicator import Communicator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fusewise.profiles.schema import Profile

log = logging.getLogger("fusewise")

Model = TypeVar("Model", bound=Callable[..., Any])


def fusion_pass(
    group: ProcessGroup | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    *,
    communicator: Communicator | None = None,
    group_names: Collection[str] = (),
    scale_first: bool = False,
) -> FusionPass:
    """A pass for ``compile(model, fusion=...)``, or for those who own their ``torch.compile`` call.

    They use it as ``torch.compile(model, options={"post_grad_custom_pre_pass": fusion_pass()})``.
    Collective unless a communicator is given.

    Args:
        group: the tensor-parallel group; None for the default group.
        profile: as for ``Communicator``.
        communicator: one that exists already; then ``group`` and ``profile`` must be None.
        group_names: further names of the group, as engines' own operators use them. Groups of
            the same ranks that exist by now, such as a device mesh's, are known anyway.
        scale_first: a factor between an all-reduce and its norm may be applied before the sum
            even if it is no power of two, which moves a rounding.

    Raises:
        InputError: a communicator and a group or profile were given, or an argument is of another
            kind.
        UnavailableError: this torch has no custom graph passes as we know them, or no process
            group is initialised.
    """
    require()
    if communicator is not None and (group is not None or profile is not None):
        raise InputError("a communicator already has its group and its profile", got="both")
    if communicator is not None and not isinstance(communicator, Communicator):
        raise InputError("communicator", expected="a Communicator", got=type(communicator).__name__)
    if isinstance(group_names, str) or not isinstance(group_names, Collection):
        raise InputError("group_names", expected="a collection of names", got=repr(group_names))
    used = communicator or Communicator(group, profile)
    log.info("%s: the pass decides by %s", used.group, used.source)
    return FusionPass(
        used.handle,
        used.plans,
        group_names={*group_names, used.group.name, *names_of(used.group.ranks)},
        device_type=used.group.device.type,
        communicator=used,
        scale_first=scale_first,
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
        InputError: ``fusion`` together with a group or profile, or an argument is of another kind.
    """
    if not callable(model):
        raise InputError("model", expected="a module or function", got=type(model).__name__)
    if fusion is not None and not isinstance(fusion, FusionPass):
        raise InputError("fusion", expected="a fusion_pass()", got=type(fusion).__name__)
    if fusion is not None and (group is not None or profile is not None):
        raise InputError("the pass already has its group and its profile", got="both")
    try:
        require()
        used = fusion or fusion_pass(group, profile)
    except UnavailableError as refused:
        warnings.warn(f"compiled without fusewise: {refused}", RuntimeWarning, stacklevel=2)
        settings = mode_options(mode, dynamic) | (options or {})
        return torch.compile(  # type: ignore[return-value]
            model, dynamic=dynamic, options=settings or None, **torch_compile
        )
    backend = InductorBackend(used, mode, options, dynamic)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, **torch_compile)
    weakref.finalize(compiled, _tell_unused, used)
    return compiled  # type: ignore[return-value]


def _tell_unused(fusion: FusionPass) -> None:
    if not fusion.graphs:
        log.warning("a compiled model is gone and nothing was compiled. %s", fusion.explain())
