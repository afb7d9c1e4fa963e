"""2, 4 and 8 ranks on one GPU: the shipped device code in one cooperative grid, with delays.

Each virtual rank has buffers of its own; only the wires are missing. What is checked here needs no
second GPU: sums, bits, epochs, graph replays in any order, and the time-out.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import pytest
import torch

from fusewise.backends.native.cuda.build import missing_compiler
from fusewise.backends.native.cuda.launch import PreparedLaunch
from fusewise.backends.native.cuda.params import DEAD_WORDS, Status
from fusewise.backends.native.cuda.prepare import group_params, one_shot, two_shot
from fusewise.backends.native.fp8 import Fp8, quantise
from fusewise.backends.native.instance import Output
from fusewise.backends.native.variants import LaunchShape
from fusewise.backends.native.workspace import SlotLayout
from fusewise.backends.norm import residual_rms_norm
from fusewise.errors import InputError
from fusewise.shape import Shape
from tests.emulator.virtual import VirtualKernels, VirtualParams, compile_all

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(missing_compiler() is not None, reason='needs pip install "fusewise[cuda]"'),
    pytest.mark.timeout(600),
]

MOST = Shape(40, 8192)
EPS = 1e-6
REPLAYS = 3000
STRATEGIES = {
    "one_shot": (one_shot, SlotLayout.one_shot),
    "two_shot": (two_shot, SlotLayout.two_shot),
}
DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
}  # fmt: skip


class Ranks:
    """``world_size`` ranks of one strategy on the current GPU."""

    def __init__(self, strategy: str, world_size: int, timeout_s: float = 20.0) -> None:
        self.strategy, self.world_size, self.timeout_s = strategy, world_size, timeout_s
        facts = torch.cuda.get_device_properties(0)
        self.sm = 10 * facts.major + facts.minor
        self.kernels = VirtualKernels(self.sm, facts.multi_processor_count)
        layout = STRATEGIES[strategy][1](MOST, world_size).with_slack()
        size = layout.size_bytes
        self.slots = [torch.full((size,), 255, dtype=torch.uint8, device="cuda")
                      for _ in range(world_size)]  # fmt: skip
        self.epochs = torch.zeros(world_size, layout.units, dtype=torch.int32, device="cuda")
        self.dead = torch.zeros(world_size, DEAD_WORDS, dtype=torch.int32, device="cuda")
        self.status = torch.zeros(world_size, 8, dtype=torch.int32, pin_memory=True)
        self.units = layout.units
        torch.cuda.synchronize()

    def call(self, shape: Shape, output: Output, present: int | None = None) -> Call:
        """One call of all ranks; ``present`` ranks only, to see the others missed."""
        return Call(self, shape, output, present or self.world_size)

    def is_idle(self) -> bool:
        """Every slot is empty again and nobody gave up."""
        torch.cuda.synchronize()
        empty = all(bool((buffer == 255).all()) for buffer in self.slots)
        return empty and not self.dead.any() and not self.status.any()


class Call:
    """One kernel launch: inputs, poisoned outputs and parameters of every rank."""

    def __init__(self, ranks: Ranks, shape: Shape, output: Output, present: int) -> None:
        self.shape, self.output = shape, output
        size, dtype = (shape.num_tokens, shape.hidden_size), DTYPES[shape.dtype]
        world = ranks.world_size
        self.x = torch.randint(-8, 9, (world, *size), device="cuda").to(dtype)
        self.residual = torch.randint(-8, 9, size, device="cuda").to(dtype)
        self.weight = torch.randn(shape.hidden_size, device="cuda").to(dtype)
        self.out = torch.empty_like(self.x)
        self.total = torch.empty_like(self.x)
        self.quantised = torch.empty_like(self.x, dtype=torch.float8_e4m3fn)
        self.scales = torch.ones(
            world, shape.num_tokens * (-(-shape.hidden_size // 128)), device="cuda"
        )
        self.poison()
        entries = b""
        for rank in range(world):
            launch, params = self._parameters(ranks, rank)
            entries += bytes(params)
        self._array = torch.frombuffer(bytearray(entries), dtype=torch.uint8).cuda()
        self._run: PreparedLaunch = ranks.kernels.prepare(
            launch, VirtualParams(self._array.data_ptr()), present
        )

    def _parameters(self, ranks: Ranks, rank: int) -> tuple[Any, ctypes.Structure]:
        group = group_params(
            [buffer.data_ptr() for buffer in ranks.slots],
            rank,
            epochs=ranks.epochs[rank].data_ptr(),
            dead=ranks.dead[rank].data_ptr(),
            status=ranks.status[rank].data_ptr(),
            units=ranks.units,
            timeout_s=ranks.timeout_s,
        )
        make = STRATEGIES[ranks.strategy][0]
        launch, params = make(self.shape, ranks.world_size, ranks.sm, self.output, group)
        params.x, params.weight = self.x[rank].data_ptr(), self.weight.data_ptr()
        params.residual, params.residual_out = self.residual.data_ptr(), self.total[rank].data_ptr()
        params.output.out = self.out[rank].data_ptr()
        params.output.quantised = self.quantised[rank].data_ptr()
        params.output.scales = params.output.static_scale = self.scales[rank].data_ptr()
        params.eps = EPS
        return launch, params

    def poison(self) -> None:
        self.out.fill_(float("nan"))
        self.total.fill_(float("nan"))

    def run(self) -> None:
        self._run(torch.cuda.current_stream().cuda_stream)

    def check(self) -> None:
        """Sums exact, norms near the reference, all ranks alike to the bit."""
        torch.cuda.synchronize()
        summed = self.x.float().sum(0)
        if self.output == "kSum":
            assert torch.equal(self.out[0].float(), summed.to(self.x.dtype).float())
        else:
            total = summed + self.residual.float()
            assert torch.equal(self.total[0], total.to(self.x.dtype))
            expected, _ = residual_rms_norm(total, None, self.weight.float(), EPS)
            # Rounded once or twice; fp32 shows the order of the row's sum and rsqrt's last bits.
            eps = (64 if self.x.dtype == torch.float32 else 2) * torch.finfo(self.x.dtype).eps
            torch.testing.assert_close(self.out[0].float(), expected, rtol=eps, atol=eps)
        for rank in range(1, len(self.x)):
            assert torch.equal(self.out[rank], self.out[0])


CASES = [("one_shot", 2), ("one_shot", 4), ("one_shot", 8), ("two_shot", 4), ("two_shot", 8)]


@pytest.mark.parametrize(("strategy", "world_size"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("output", ["kNorm", "kSum"])
def test_every_width_and_number_of_tokens(
    strategy: str, world_size: int, dtype: Any, output: Output
) -> None:
    ranks = Ranks(strategy, world_size)
    widths = (8, 264, 2048, 2880, 3584, 5120, 7168, 8192)
    shapes = [Shape(tokens, width, dtype) for width in widths for tokens in (1, 2, 7, 17)]
    launch_of = getattr(LaunchShape, strategy)
    launches = [launch_of(shape, world_size, ranks.sm, output) for shape in shapes]
    compile_all({launch.instance for launch in launches}, ranks.sm)
    for shape in shapes:
        call = ranks.call(shape, output)
        for _ in range(3):
            call.poison()
            call.run()
            call.check()
    assert ranks.is_idle()


@pytest.mark.parametrize(("strategy", "world_size"), CASES)
def test_graph_replays_in_random_order_of_shapes(strategy: str, world_size: int) -> None:
    rng = random.Random(world_size)
    ranks = Ranks(strategy, world_size)
    shapes = [Shape(t, h) for t, h in ((1, 2048), (17, 2880), (40, 4096), (3, 8192), (29, 264))]
    calls = [ranks.call(shape, rng.choice(["kNorm", "kSum"])) for shape in shapes]
    graphs = []
    for call in calls:
        call.run()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call.run()
    for step in range(REPLAYS):
        at = rng.randrange(len(calls))
        if step % 100 == 0:
            calls[at].poison()
        graphs[at].replay()
        if step % 100 == 0:
            calls[at].check()
    assert ranks.is_idle()


@pytest.mark.parametrize(("strategy", "world_size"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_signed_zeros_subnormals_infinities_and_nans(
    strategy: str, world_size: int, dtype: Any
) -> None:
    ranks = Ranks(strategy, world_size)
    call = ranks.call(Shape(4, 2048, dtype), "kSum")
    tiny = torch.finfo(DTYPES[dtype]).smallest_normal
    special = torch.tensor([0.0, -0.0, tiny / 4, -tiny / 4, float("inf"), float("nan"), 1.0])
    pick = torch.randint(0, len(special), call.x.shape)
    call.x.copy_(special.to(DTYPES[dtype])[pick])
    call.x[:, 0] = -0.0
    call.x[0, 1].view(torch.uint8).fill_(255)  # the sentinel itself
    call.run()
    torch.cuda.synchronize()
    expected = call.x[0].float()
    for rank in range(1, world_size):
        expected = expected + call.x[rank].float()
    expected = expected.to(DTYPES[dtype])
    for out in call.out:
        assert torch.equal(out.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(out[numbers], expected[numbers])
        assert torch.equal(out[numbers].signbit(), expected[numbers].signbit())
    assert ranks.is_idle()


@pytest.mark.parametrize(("strategy", "world_size"), CASES)
@pytest.mark.parametrize("scaling", ["static", "token", "group"])
@pytest.mark.parametrize("hidden_size", [2048, 2880])
def test_fp8_equals_a_quantiser_of_the_norm(
    strategy: str, world_size: int, scaling: Any, hidden_size: int
) -> None:
    ranks = Ranks(strategy, world_size)
    if ranks.sm < 89:
        pytest.skip("e4m3 needs sm_89 or newer")
    outputs: dict[str, Output] = {
        "static": "kStaticFp8", "token": "kTokenFp8", "group": "kGroupFp8",
    }  # fmt: skip
    call = ranks.call(Shape(5, hidden_size), outputs[scaling])
    call.run()
    torch.cuda.synchronize()
    static = torch.ones(1, device="cuda") if scaling == "static" else None
    expected, scales = quantise(call.out[0], Fp8(scaling), static)
    for rank in range(world_size):
        assert torch.equal(call.quantised[rank].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(call.scales[rank].flatten()[: scales.numel()], scales.flatten())
    assert ranks.is_idle()


@pytest.mark.parametrize(("strategy", "world_size"), CASES)
def test_a_missing_rank_is_named_and_the_others_return(strategy: str, world_size: int) -> None:
    ranks = Ranks(strategy, world_size, timeout_s=0.05)
    call = ranks.call(Shape(3, 2048), "kNorm", present=world_size - 1)
    call.run()
    torch.cuda.synchronize()
    for rank in range(world_size - 1):
        status = Status.from_address(ranks.status[rank].data_ptr())
        assert (status.state, status.rank) == (1, rank)
        assert status.row in (0, 1, 2)
        assert call.out[rank].isnan().all()
    missed = {Status.from_address(ranks.status[r].data_ptr()).peer for r in range(world_size - 1)}
    assert world_size - 1 in missed


def test_a_row_too_wide_is_refused() -> None:
    with pytest.raises(InputError, match="row too wide"):
        Ranks("one_shot", 2).call(Shape(1, 8 * 8200 * 2), "kNorm")
