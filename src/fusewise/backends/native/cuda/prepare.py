"""From a shape to a launch: the parameters that the shape and the group fix.

Pure but for the kernel's loading. Tensors' addresses, eps and weight_bias are written per call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusewise.backends.native.cuda.params import GroupParams, OneShotParams, TwoShotParams
from fusewise.backends.native.instance import (
    UNIT_BYTES,
    Output,
    sources_of,
    units_per_row,
    vectors_per_row,
)
from fusewise.backends.native.variants import LaunchShape, variant
from fusewise.backends.native.workspace import shard_vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewise.shape import Shape


def group_params(
    slots: Sequence[int],
    rank: int,
    *,
    epochs: int,
    dead: int,
    status: int,
    units: int,
    timeout_s: float,
) -> GroupParams:
    """The group's part of the parameters.

    Args:
        slots: per rank, the address at which this rank reaches that rank's slots.
        rank: this rank.
        epochs: address of ``units`` counters in this rank's memory.
        dead: address of ``DEAD_WORDS`` words in this rank's memory.
        status: address of a ``Status``, in host memory that the device can write.
        units: of the slots' layout.
        timeout_s: bound of a wait on the device.
    """
    params = GroupParams(
        slots=slots[rank],
        epochs=epochs,
        dead=dead,
        status=status,
        timeout_ns=int(timeout_s * 1e9),
        unit_capacity=units,
        rank=rank,
    )
    source = rank % sources_of(len(slots))
    for i in range(len(slots) - 1):
        params.peers[i] = slots[(rank + 1 + i) % len(slots)] + source * UNIT_BYTES
    return params


def one_shot(
    shape: Shape, world_size: int, sm: int, output: Output, group: GroupParams, name: str = ""
) -> tuple[LaunchShape, OneShotParams]:
    """Launch and parameters of the one-shot kernel, in the variant of that name.

    Raises:
        InputError: no such variant, or the row is wider than it takes.
    """
    launch = LaunchShape.one_shot(shape, world_size, sm, output, variant("one_shot", name))
    row_vectors = vectors_per_row(shape)
    return launch, OneShotParams(
        group=group,
        num_tokens=shape.num_tokens,
        row_vectors=row_vectors,
        row_units=units_per_row(row_vectors),
        inverse_hidden_size=1.0 / shape.hidden_size,
    )


def two_shot(
    shape: Shape, world_size: int, sm: int, output: Output, group: GroupParams, name: str = ""
) -> tuple[LaunchShape, TwoShotParams]:
    """Launch and parameters of the two-shot kernel, in the variant of that name."""
    launch = LaunchShape.two_shot(shape, world_size, sm, output, variant("two_shot", name))
    columns = shard_vectors(shape, world_size)
    return launch, TwoShotParams(
        group=group,
        num_tokens=shape.num_tokens,
        row_vectors=vectors_per_row(shape),
        shard_vectors=columns,
        shard_units=units_per_row(columns),
        rows_per_tile=launch.rows_per_tile,
        inverse_hidden_size=1.0 / shape.hidden_size,
    )
