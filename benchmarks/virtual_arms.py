"""What virtual_node.py times: W ranks on one GPU, each kernel launched as on a real node.

Every rank has buffers, a stream and parameters of its own; only the wires are missing. Our kernels
come from the package's sources, or from a copy of them with edits (a patch). FlashInfer's come from
its own module, over a table of pointers into this GPU's memory.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from virtual_floors import FLOORS, floor_edit

from fusewise.backends.native.cuda.build import SOURCES, compile_instance
from fusewise.backends.native.cuda.launch import Kernels
from fusewise.backends.native.cuda.params import DEAD_WORDS
from fusewise.backends.native.cuda.prepare import group_params, one_shot, two_shot
from fusewise.backends.native.instance import WARP, Instance, bound, round_up, vectors_per_row
from fusewise.backends.native.variants import LaunchShape, Variant
from fusewise.backends.native.workspace import SlotLayout
from fusewise.shape import Shape

EPS = 1e-6
TIMEOUT_S = 1.0
GEMM_K = 1024  # columns of the GEMM before a call: [num_tokens, 1024] x [1024, hidden_size]
STRATEGIES = {
    "one_shot": (one_shot, SlotLayout.one_shot),
    "two_shot": (two_shot, SlotLayout.two_shot),
}
Code = Callable[[Instance], bytes]


@dataclass(frozen=True)
class Patch:
    """Changes to one of our kernels, to be timed beside it.

    Attributes:
        kernel: ``one_shot`` or ``two_shot``.
        edits: (file, old text or nothing for all of it, new text).
        variant: fields of ``Variant``: another of the shipped launches.
        instance: fields of ``Instance`` that change.
        launch: fields of ``LaunchShape`` that change.
    """

    kernel: str
    edits: tuple[tuple[str, str, str], ...] = ()
    variant: dict[str, Any] = field(default_factory=dict)
    instance: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)

    def machine_code(self, instance: Instance, sm: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            sources = Path(folder)
            for path in SOURCES.glob("*.cu*"):
                shutil.copy(path, sources)
            for name, old, new in self.edits:
                path = sources / name
                if old and old not in path.read_text():
                    raise ValueError(f"{name} has no {old!r}")
                path.write_text(path.read_text().replace(old, new) if old else new)
            return compile_instance(instance, sm, source=sources / f"{instance.kernel}.cu")


class Node:
    """W ranks' tensors for one shape: x and residual, two outputs, a GEMM's operands."""

    def __init__(self, world_size: int, shape: Shape, streams: list[torch.cuda.Stream]) -> None:
        self.world_size, self.shape, self.streams = world_size, shape, streams[:world_size]
        size, dtype = (shape.num_tokens, shape.hidden_size), getattr(torch, shape.dtype)
        self.x = torch.randint(-4, 5, (world_size, *size), device="cuda").to(dtype)
        self.residual = torch.randint(-4, 5, size, device="cuda").to(dtype)
        self.weight = torch.randn(shape.hidden_size, device="cuda").to(dtype)
        self.out, self.total = torch.empty_like(self.x), torch.empty_like(self.x)
        self.expected = (self.x.float().sum(0) + self.residual.float()).to(dtype)
        self.a = torch.randn(world_size, size[0], GEMM_K, device="cuda").to(dtype) / 32
        # One weight matrix: on a real node no rank's weights push another's out of its L2.
        self.b = torch.randn(GEMM_K, size[1], device="cuda").to(dtype) / 32

    def gemm(self, rank: int) -> None:
        """The GEMM whose output is reduced; the current stream's."""
        torch.mm(self.a[rank], self.b, out=self.x[rank])

    def poison(self) -> None:
        self.out.fill_(float("nan"))
        self.total.fill_(float("nan"))

    def wrong(self) -> str:
        """What is wrong with the outputs of all ranks; empty if nothing."""
        torch.cuda.synchronize()
        if any(not torch.equal(total, self.expected) for total in self.total):
            return "wrong sum"
        value = self.expected.double()
        norm = value * (value.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight.double()
        error = (self.out[0].double() - norm).abs().max() / norm.abs().max()
        if not error < 0.02:
            return f"norm off by {error:.3g}"
        return "" if all(torch.equal(out, self.out[0]) for out in self.out) else "ranks differ"


@dataclass
class Arm:
    """One way to run the operation: ``call(rank)`` enqueues it on the rank's stream, which must be
    current. ``keep`` owns what the kernels use; ``dead`` says whether a wait timed out."""

    name: str
    call: Callable[[int], None]
    keep: Any
    note: str = ""
    is_floor: bool = False
    dead: Callable[[], bool] = lambda: False


class OurKernels(Kernels):
    """Kernels that share the device among ``share`` grids that must be resident together."""

    def __init__(self, sm: int, multiprocessors: int, share: int, code: Code) -> None:
        super().__init__(sm, multiprocessors)
        self._share, self._code = share, code

    def machine_code(self, instance: Instance) -> bytes:
        return self._code(instance)

    def _resident_workers(self, *arguments: Any) -> int:
        return super()._resident_workers(*arguments) // self._share


def launch_shape(patch: Patch, shape: Shape, world_size: int, sm: int) -> LaunchShape:
    """The launch of a patched kernel, with the block size that its vectors and blocks ask for."""
    make, variant = getattr(LaunchShape, patch.kernel), Variant(**patch.variant)
    default = make(shape, world_size, sm, "kNorm", variant)
    launch = replace(default, instance=replace(default.instance, **patch.instance))
    if patch.kernel == "one_shot" and "threads" not in patch.launch:
        lanes = launch.instance.vectors * launch.instance.blocks
        launch = replace(launch, threads=round_up(-(-vectors_per_row(shape) // lanes), WARP))
    launch = replace(launch, **patch.launch)
    if patch.kernel == "one_shot":
        launch = replace(launch, instance=bound(launch.instance, launch.threads))
    return launch


def native(node: Node, name: str, patch: Patch, code: Code) -> Arm:
    """One of our kernels on every rank."""
    facts = torch.cuda.get_device_properties(0)
    sm, world = 10 * facts.major + facts.minor, node.world_size
    launch = launch_shape(patch, node.shape, world, sm)
    make, layout_of = STRATEGIES[patch.kernel]
    layout = layout_of(node.shape, world)
    slots = [
        torch.full((layout.size_bytes,), 255, dtype=torch.uint8, device="cuda")
        for _ in range(world)
    ]
    epochs = [torch.zeros(layout.units, dtype=torch.int32, device="cuda") for _ in range(world)]
    dead = [torch.zeros(DEAD_WORDS, dtype=torch.int32, device="cuda") for _ in range(world)]
    status = torch.zeros(world, 8, dtype=torch.int32, pin_memory=True)
    share = world * (2 if launch.instance.early_trigger else 1)
    kernels = OurKernels(sm, facts.multi_processor_count, share, code)
    prepared = []
    for rank in range(world):
        group = group_params(
            [one.data_ptr() for one in slots],
            rank,
            epochs=epochs[rank].data_ptr(),
            dead=dead[rank].data_ptr(),
            status=status[rank].data_ptr(),
            units=layout.units,
            timeout_s=TIMEOUT_S,
        )
        _, params = make(node.shape, world, sm, "kNorm", group)
        if patch.kernel == "two_shot":
            params.rows_per_tile = launch.rows_per_tile
        fill(params, node, rank)
        prepared.append(kernels.prepare(launch, params))
    streams = [stream.cuda_stream for stream in node.streams]
    config, instance = prepared[0]._config, launch.instance
    note = f"V{instance.vectors} B{instance.blocks} t{launch.threads} r{launch.rows_per_tile}"
    note += f" g{config.gridDimX}"
    keep = (slots, epochs, dead, status, prepared)
    return Arm(
        name,
        lambda rank: prepared[rank](streams[rank]),
        keep,
        note,
        dead=lambda: bool(status[:, 0].any()),
        is_floor=any(patch == floor(one) for one in FLOORS),
    )


def fill(params: ctypes.Structure, node: Node, rank: int) -> None:
    params.x, params.weight = node.x[rank].data_ptr(), node.weight.data_ptr()
    params.residual, params.residual_out = node.residual.data_ptr(), node.total[rank].data_ptr()
    params.output.out, params.eps = node.out[rank].data_ptr(), EPS


def floor(name: str) -> Patch:
    """A kernel that does nothing, or exchanges one vector per lane of one warp, or all of the
    message in the launch that ours has; with the trigger right behind the wait, or like the shipped
    kernels' at the end."""
    edits = (floor_edit(name),)
    if ":all" in name:
        instance = {"vectors": 1, "early_trigger": "late" not in name}
        return Patch("one_shot", edits, instance=instance)
    launch = {"threads": WARP, "workers": 1}
    return Patch("one_shot", edits, instance={"vectors": 1, "blocks": 1}, launch=launch)


def flashinfer(node: Node, name: str) -> Arm:
    """FlashInfer's fused kernel over a workspace made by hand: staging, flags and Lamport buffers
    of every rank, then five counters of this rank's own (trtllm_ar.py, 0.6.11.post2)."""
    from flashinfer.comm import trtllm_ar

    world, shape = node.world_size, node.shape
    size = world * shape.message_bytes
    staging = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(world)]
    flags = [
        torch.zeros(world * trtllm_ar.BarrierFlagCount, dtype=torch.int32, device="cuda")
        for _ in range(world)
    ]
    dtype = torch.float32 if shape.dtype == "float32" else torch.float16
    lamport = [
        torch.full((3 * size // dtype.itemsize,), -0.0, dtype=dtype, device="cuda")
        for _ in range(world)
    ]
    counters = [
        torch.tensor([0, 0, 0, size, 0], dtype=torch.int32, device="cuda") for _ in range(world)
    ]
    pointers = [one.data_ptr() for group in (staging, flags, lamport) for one in group]
    tables = [
        torch.tensor([*pointers, one.data_ptr()], dtype=torch.int64, device="cuda")
        for one in counters
    ]
    module, pattern = trtllm_ar.get_trtllm_comm_module(), trtllm_ar.AllReduceFusionPattern

    def call(rank: int) -> None:
        module.trtllm_allreduce_fusion(
            allreduce_in=node.x[rank], world_size=world, world_rank=rank,
            token_num=shape.num_tokens,
            launch_with_pdl=True, hidden_dim=shape.hidden_size, workspace_ptrs=tables[rank],
            use_oneshot="one_shot" in name, fp32_acc=True,
            trigger_completion_at_end="early" not in name,
            pattern_code=pattern.kARResidualRMSNorm, allreduce_out=None, residual_in=node.residual,
            residual_out=node.total[rank], norm_out=node.out[rank], quant_out=None, scale_out=None,
            rms_gamma=node.weight, rms_eps=EPS, scale_factor=None, layout_code=None,
            block_quant_group_size=None,
        )  # fmt: skip

    return Arm(name, call, (staging, flags, lamport, counters, tables))
