"""Which sizes a graph serves decides what becomes of a site."""

from __future__ import annotations

from fusewise.graph.decide import Choice, TokenRange, bands_between, decide
from fusewise.operation import Op, unfused_path
from fusewise.profiles.bands import Band, Plan, Table, default_plan

HIDDEN = 1024  # bf16: 2 KiB per token
ROW = 2 * HIDDEN
NCCL = unfused_path("nccl")


def _table(op: Op, *bands: tuple[int, str]) -> Table:
    starts = [tokens * ROW for tokens, _ in bands]
    ends = [*starts[1:], None]
    made = tuple(
        Band(start, end, path, "fuse", "measured")
        for start, end, (_, path) in zip(starts, ends, bands, strict=True)
    )
    return Table(op, HIDDEN, made, 0, starts[-1])


FUSED_UP_TO_63 = Plan(
    "bfloat16",
    NCCL,
    (_table("all_reduce_rms_norm", (0, "flashinfer.one_shot"), (64, NCCL)),),
    "test",
)


def _choice(plan: Plan, low: int, high: int | None, torch_reduces: bool = True) -> Choice:
    return decide(plan, HIDDEN, TokenRange(low, high), torch_reduces).choice


def test_one_size_on_each_side_of_the_boundary() -> None:
    assert _choice(FUSED_UP_TO_63, 63, 63) == "fuse"
    assert _choice(FUSED_UP_TO_63, 64, 64) == "leave"


def test_a_range_that_ends_at_the_boundary_lies_on_one_side() -> None:
    assert _choice(FUSED_UP_TO_63, 1, 63) == "fuse"
    assert _choice(FUSED_UP_TO_63, 64, None) == "leave"


def test_a_range_one_token_across_the_boundary_decides_per_call() -> None:
    assert _choice(FUSED_UP_TO_63, 1, 64) == "decide per call"
    assert _choice(FUSED_UP_TO_63, 63, 64) == "decide per call"
    assert _choice(FUSED_UP_TO_63, 0, None) == "decide per call"


def test_two_fused_bands_are_one_side() -> None:
    table = _table("all_reduce_rms_norm", (0, "native.one_shot"), (64, "native.two_shot"))
    assert _choice(Plan("bfloat16", NCCL, (table,), "test"), 0, None) == "fuse"


def test_without_a_measurement_everything_is_left() -> None:
    assert _choice(default_plan("bfloat16", NCCL), 0, None) == "leave"


def test_a_better_all_reduce_replaces_torchs_own_where_the_unfused_side_wins() -> None:
    multimem = unfused_path("multimem")
    tables = (
        _table("all_reduce_rms_norm", (0, "native.one_shot"), (64, multimem), (512, NCCL)),
        _table("all_reduce", (0, "symm_mem.one_shot"), (64, "multimem"), (512, "nccl")),
    )
    plan = Plan("bfloat16", NCCL, tables, "test")
    assert _choice(plan, 64, 511) == "all_reduce only"
    assert _choice(plan, 64, 512) == "all_reduce only"
    assert _choice(plan, 512, None) == "leave"
    # An engine's or our own all-reduce dispatches by itself.
    assert _choice(plan, 64, 511, torch_reduces=False) == "leave"


def test_the_reason_names_the_bands() -> None:
    why = decide(FUSED_UP_TO_63, HIDDEN, TokenRange(1, 64), True).why
    assert why == f"0B–128K: flashinfer.one_shot (fuse); 128K–…: {NCCL} (fuse)"


def test_bands_between_never_answers_with_nothing() -> None:
    for low in (0, 63, 64, 10**9):
        assert bands_between(FUSED_UP_TO_63, "all_reduce_rms_norm", HIDDEN, TokenRange(low, low))
