"""Where the pass meets Inductor. Everything taken from torch's private side is checked here.

``InductorBackend`` is Inductor with the pass in front of it: behind AOTAutograd, its
decompositions and the joint passes, where the collectives are still ``_c10d_functional`` calls and
nothing was reordered; before Inductor looks into its cache of compiled graphs, so that the cache
knows a graph by what the pass made of it and every rank's pass sees every graph. AOTAutograd's
own cache lies in front of that and is not asked. Read in torch 2.11.0 and 2.13.0.

The hook ``post_grad_custom_pre_pass``, for those who own their ``torch.compile``, lies behind the
caches: graphs compiled through it are not cached.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusewise.errors import UnavailableError
from fusewise.graph.fusion_pass import FusionPass

HOOK = "post_grad_custom_pre_pass"


class InductorBackend(torch._TorchCompileInductorWrapper):
    """``torch.compile(model, backend=...)``: Inductor behind the pass.

    Args:
        fusion: the pass.
        mode, options, dynamic: as for ``torch.compile``; mode and options may come together.
    """

    def __init__(
        self,
        fusion: FusionPass,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        dynamic: bool | None = None,
    ) -> None:
        settings = mode_options(mode, dynamic) | (options or {})
        super().__init__(None, settings, dynamic)  # type: ignore[no-untyped-call]
        self.fusion = fusion

    def __eq__(self, other: object) -> bool:
        """Code compiled for one pass never serves another."""
        same = super().__eq__(other)  # type: ignore[no-untyped-call]
        return bool(same) and isinstance(other, InductorBackend) and self.fusion is other.fusion

    def __hash__(self) -> int:
        return hash(id(self.fusion))

    def __call__(self, model_: Any, inputs_: Any, **given: Any) -> Any:
        """The compiled form of one of Dynamo's graphs."""
        from torch._functorch import config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        patches = {**self.config, **(given.pop("config_patches", None) or {})}
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(model_, inputs_, inner_compile=self._inner, config_patches=patches)

    def _inner(self, gm: torch.fx.GraphModule, example_inputs: Any, **given: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        inference = bool(given.get("is_inference"))
        for module in gm.modules():  # regions compiled on their own are submodules
            if isinstance(module, torch.fx.GraphModule):
                module.graph.eliminate_dead_code()
                self.fusion.rewrite(module.graph, inference=inference)
                module.recompile()
        return compile_fx_inner(gm, example_inputs, **given)


def mode_options(mode: str | None, dynamic: bool | None) -> dict[str, Any]:
    """The options that one of ``torch.compile``'s modes stands for."""
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic))


def missing_feature() -> str | None:
    """What this torch lacks for the pass, or None."""
    try:
        from torch._inductor import config, custom_graph_pass
    except ImportError as error:
        return f"an Inductor that can be imported ({error})"
    base = getattr(custom_graph_pass, "CustomGraphPass", None)
    if not isinstance(base, ABCMeta) or not hasattr(base, "uuid"):
        return "torch._inductor.custom_graph_pass.CustomGraphPass with a uuid()"
    if list(inspect.signature(base.__call__).parameters) != ["self", "graph"]:
        return "CustomGraphPass.__call__(self, graph)"
    if HOOK not in config.get_config_copy():
        return f"torch._inductor.config.{HOOK}"
    return None if hasattr(ShapeEnv, "bound_sympy") else "ShapeEnv.bound_sympy"


def require() -> None:
    """Makes ``FusionPass`` a pass in Inductor's eyes.

    Raises:
        UnavailableError: this torch's Inductor is not one we know; says what is missing.
    """
    missing = missing_feature()
    if missing is not None:
        raise UnavailableError(
            "the fusion pass cannot be installed in this torch",
            expected=missing,
            got=f"torch {torch.__version__}",
            hint="Models still compile and run, unchanged; use torch 2.11 to 2.13 for the pass.",
        )
    from torch._inductor.custom_graph_pass import CustomGraphPass

    CustomGraphPass.register(FusionPass)
