"""FP8 through the communicator and its operator on CPU ranks: against float64 and between ranks."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import pytest
import torch

from fusewise import Communicator, Fp8
from fusewise.backends.native.fp8 import quantise
from fusewise.errors import InputError
from fusewise.operation import ALL_REDUCE_RMS_NORM
from fusewise.shape import Shape
from fusewise.tune.operands import normals
from tests.nodes import node_profile
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SHAPES = [(1, 64), (7, 264), (17, 2880)]
SCALINGS = ("static", "token", "group")
DTYPES = ("bfloat16", "float16", "float32")
EPS = 1e-5


def _operands(rank: int, shape: Shape) -> tuple[Any, ...]:
    inputs = [normals(shape, r, CPU, 3) for r in range(2)]
    weight = normals(Shape(1, shape.hidden_size, shape.dtype), 8, CPU, 3).view(-1)
    return inputs, inputs[rank], normals(shape, 9, CPU, 3), weight


def _error(result: Any, exact: torch.Tensor, norms_error: torch.Tensor) -> float:
    """The largest distance from a float64 norm, in units of what is allowed to each element."""
    scales = result.scales.double()
    if scales.ndim == 2 and scales.shape[1] > 1:
        scales = scales.repeat_interleave(128, 1)[:, : exact.shape[1]]
    room = exact.clamp(-448 * scales, 448 * scales)  # a static scale clamps
    value = result.quantised.double() * scales
    # Three bits of mantissa: half a step is 2^-4 of the value; below 2^-6 a step is 2^-9 scales.
    rounding = torch.maximum(room.abs() * 2**-4, scales * 2**-10)
    return float(((value - room).abs() / (rounding + norms_error)).max())


def _norms_error(
    inputs: list[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """What a path that rounds each sum may be off by: eps of all that was added, normalised."""
    added = sum(t.double().abs() for t in [*inputs, residual])
    total = sum(t.double() for t in [*inputs, residual])
    assert isinstance(added, torch.Tensor) and isinstance(total, torch.Tensor)
    scale = (total.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return torch.finfo(weight.dtype).eps * added * scale * weight.double().abs()


def _results(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"errors": {}, "quantiser": [], "operator": [], "bits": []}
    digest = hashlib.sha256()
    static = torch.tensor([0.013])
    # shm runs fused, gloo unfused: both end in the quantiser.
    for label, profile in (("shm", node_profile()), ("gloo", node_profile(50.0))):
        with Communicator(profile=profile) as comm:
            for rows, hidden in SHAPES:
                for dtype in DTYPES:
                    shape = Shape(rows, hidden, dtype)  # type: ignore[arg-type]
                    inputs, x, residual, weight = _operands(rank, shape)
                    exact, _ = ALL_REDUCE_RMS_NORM.reference(inputs, residual, weight, EPS)
                    slack = _norms_error(inputs, residual, weight)
                    plain = comm.all_reduce_rms_norm(x, residual, weight, EPS)
                    for scaling in SCALINGS:
                        scale = static if scaling == "static" else None
                        fp8 = Fp8(scaling, keep_norm=rows > 1)  # type: ignore[arg-type]
                        got = comm.all_reduce_rms_norm(
                            x, residual, weight, EPS, fp8=fp8, static_scale=scale
                        )
                        found["errors"][f"{label} {shape} {scaling}"] = _error(got, exact, slack)
                        values, scales = quantise(plain[0], fp8, scale)
                        same = torch.equal(
                            got.quantised.view(torch.uint8), values.view(torch.uint8)
                        )
                        same &= torch.equal(got.scales, scales)
                        same &= torch.equal(got.residual_out, plain[1])
                        same &= got.norm is None if rows == 1 else torch.equal(got.norm, plain[0])
                        found["quantiser"].append(same)
                        found["operator"].append(
                            _operator(comm, x, residual, weight, got, fp8, scale)
                        )
                        for tensor in (got.quantised, got.scales, got.residual_out):
                            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    found["bits"] = digest.hexdigest()
    return found


def _operator(
    comm: Communicator, x: Any, residual: Any, weight: Any, got: Any, fp8: Fp8, scale: Any
) -> bool:
    """Whether the operator returns the same, its empty results in their places."""
    quantised, scales, total, norm = torch.ops.fusewise.all_reduce_rms_norm_fp8(
        x, residual, weight, EPS, 0.0, fp8.scaling, scale, fp8.keep_norm, comm.handle
    )
    expected_scales = got.scales if scale is None else torch.empty(0)
    expected_norm = torch.empty(0, dtype=x.dtype) if got.norm is None else got.norm
    return (
        torch.equal(quantised.view(torch.uint8), got.quantised.view(torch.uint8))
        and torch.equal(scales, expected_scales)
        and torch.equal(total, got.residual_out)
        and torch.equal(norm, expected_norm)
    )


def _edges(rank: int, found: dict[str, Any]) -> dict[str, Any]:
    """Shapes, refusals, tracing."""
    with Communicator(profile=node_profile()) as comm:
        x, weight = torch.randn(6, 200, dtype=torch.bfloat16), torch.ones(200, dtype=torch.bfloat16)
        for scaling in SCALINGS:
            scale = torch.tensor([0.02]) if scaling == "static" else None
            fp8 = Fp8(scaling, True)  # type: ignore[arg-type]

            def call(x: torch.Tensor, fp8: Fp8 = fp8, scale: Any = scale) -> Any:
                got = comm.all_reduce_rms_norm(x, None, weight, fp8=fp8, static_scale=scale)
                return got.quantised.view(torch.uint8), got.scales, got.residual_out, got.norm

            deep = call(x.view(2, 3, 200))
            found[f"deep {scaling}"] = [tuple(t.shape) for t in deep]
            found[f"empty {scaling}"] = [tuple(t.shape) for t in call(x[:0])]
            arguments = (x, None, weight, 1e-6, 0.0, scaling, scale, rank >= 0, comm.handle)
            found[f"opcheck {scaling}"] = torch.library.opcheck(
                torch.ops.fusewise.all_reduce_rms_norm_fp8.default, arguments,
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip
            traced = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
            flat = call(x)
            found[f"traced {scaling}"] = all(map(torch.equal, traced, flat))
        for name, how in {
            "missing scale": {"fp8": Fp8("static")},
            "superfluous scale": {"fp8": Fp8("token"), "static_scale": torch.ones(1)},
            "scale alone": {"static_scale": torch.ones(1)},
            "two scales": {"fp8": Fp8("static"), "static_scale": torch.ones(2)},
        }.items():
            try:
                comm.all_reduce_rms_norm(x, None, weight, **how)  # type: ignore[call-overload]
            except InputError as error:
                found[name] = str(error)
    return found


def _all(rank: int) -> dict[str, Any]:
    with torch.no_grad():
        return _edges(rank, _results(rank))


@cache
def results() -> list[dict[str, Any]]:
    return run_ranks(_all, 2)


def test_every_scaling_is_within_what_e4m3_holds_of_float64() -> None:
    for found in results():
        assert len(found["errors"]) == 2 * len(SHAPES) * len(DTYPES) * len(SCALINGS)
        assert max(found["errors"].values()) <= 1.0, found["errors"]


def test_results_equal_the_quantiser_of_the_norm_and_the_operators() -> None:
    for found in results():
        assert all(found["quantiser"])
        assert all(found["operator"])


def test_ranks_hold_the_same_bits() -> None:
    first, second = (found["bits"] for found in results())
    assert first == second


@pytest.mark.parametrize(("scaling", "columns"), [("static", 0), ("token", 1), ("group", 2)])
def test_shapes_schemas_and_tracing(scaling: str, columns: int) -> None:
    for found in results():
        full = (2, 3, 200)
        scales = (2, 3, columns) if columns else (1,)
        assert found[f"deep {scaling}"] == [full, scales, full, full]
        scales = (0, columns) if columns else (1,)
        assert found[f"empty {scaling}"] == [(0, 200), scales, (0, 200), (0, 200)]
        wanted = {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}
        assert found[f"opcheck {scaling}"] == wanted
        assert found[f"traced {scaling}"]


def test_a_scale_that_does_not_fit_is_refused() -> None:
    for found in results():
        assert "static scaling: expected a static_scale" in found["missing scale"]
        assert "token scaling: expected a static_scale with scaling" in found["superfluous scale"]
        assert "a static_scale without fp8" in found["scale alone"]
        assert "expected one float32 on cpu" in found["two scales"]
