"""An Inductor that is not as we know it: one clear message, and the model keeps working."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.codecache  # binds the real class before a test replaces it
from torch._inductor import custom_graph_pass

from fusewise.errors import InputError, UnavailableError
from fusewise.graph import inductor
from fusewise.graph.api import compile as compile_model
from fusewise.graph.api import fusion_pass
from fusewise.graph.fusion_pass import FusionPass
from fusewise.graph.inductor import InductorBackend


class OldGraphPass:
    def __call__(self, graph: torch.fx.Graph, is_inference: bool) -> None: ...


def _has_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_graph_pass, "CustomGraphPass", OldGraphPass)


def _calls_passes_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        custom_graph_pass.CustomGraphPass, "__call__", lambda self, graph, is_inference: None
    )


def _lacks_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "HOOK", "post_grad_hook_of_the_future")


UNKNOWN = (_has_another_class, _calls_passes_otherwise, _lacks_the_hook)


@pytest.mark.parametrize("change", UNKNOWN)
def test_an_unknown_api_is_refused_and_named(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(UnavailableError, match=r"cannot be installed in this torch: expected .+"):
        fusion_pass()


@pytest.mark.parametrize("change", UNKNOWN)
def test_the_model_still_compiles_and_runs(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.warns(RuntimeWarning, match="compiled without fusewise") as told:
        compiled = compile_model(lambda x: x + 1, backend="eager")
    assert len(told) == 1
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_this_torch_is_known() -> None:
    assert inductor.missing_feature() is None


def test_the_pass_counts_as_inductors_own() -> None:
    inductor.require()
    fusion = FusionPass("0", {})
    assert isinstance(fusion, custom_graph_pass.CustomGraphPass)
    assert fusion.uuid() is None  # what lies in front of a cache must not be cached by it


def test_a_pass_and_a_profile_exclude_each_other() -> None:
    with pytest.raises(InputError, match="already has its group"):
        compile_model(lambda x: x, fusion=FusionPass("0", {}), profile="nvidia-h200-tp8")


def test_what_is_of_another_kind_is_named() -> None:
    for name, given in (
        ("model", {"model": 3}),
        ("fusion", {"model": lambda x: x, "fusion": "x"}),
    ):
        with pytest.raises(InputError, match=f"^{name}: expected "):
            compile_model(**given)  # type: ignore[arg-type]
    for name, given in (
        ("communicator", {"communicator": 3}),
        ("group_names", {"group_names": "tp"}),
    ):
        with pytest.raises(InputError, match=f"^{name}: expected "):
            fusion_pass(**given)  # type: ignore[arg-type]


def test_mode_and_options_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` itself refuses both at once."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda model, **given: seen.update(given) or model)
    fusion = FusionPass("0", {})
    options = {"epilogue_fusion": False}
    compile_model(
        lambda x: x, fusion=fusion, mode="reduce-overhead", options=options, fullgraph=True
    )
    assert seen["backend"].config == {"triton.cudagraphs": True, "epilogue_fusion": False}
    assert (seen["fullgraph"], "mode" in seen, "options" in seen) == (True, False, False)


def test_code_compiled_for_one_pass_never_serves_another() -> None:
    one, other = FusionPass("0", {}), FusionPass("0", {})
    assert InductorBackend(one) == InductorBackend(one)
    assert InductorBackend(one) != InductorBackend(other)
    assert InductorBackend(one) != InductorBackend(one, options={"max_autotune": True})
