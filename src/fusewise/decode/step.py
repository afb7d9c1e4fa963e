"""One model's decode step and prefill, compiled once per kind of graph, captured once per arm.

A graph differs by what the pass did to it (fused, all-reduce replaced, left), not by which path
runs inside: that is the active communicator's business. So arms share compiled graphs, and on
GPUs each arm captures its own CUDA graph, in which its paths are fixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from fusewise.decode.config import DecodeSettings
from fusewise.decode.models import cache_name
from fusewise.graph.api import compile as compile_model
from fusewise.graph.api import names_of
from fusewise.graph.decide import Choice
from fusewise.graph.fusion_pass import FusionPass
from fusewise.graph.interpreted import interpreted_backend
from fusewise.operation import all_reduce_of
from fusewise.profiles.bands import Plan, Table, default_band
from fusewise.shape import DType
from fusewise.tune.timing import captured

if TYPE_CHECKING:
    from torch import Tensor

    from fusewise.ranks.group import Group
    from fusewise.run.communicator import Communicator

_WARM_STEPS = 3  # Triton and NVRTC kernels compile at first use, which must not be under capture


def forcing_plan(choice: Choice, dtype: DType, hidden_size: int, baseline: str) -> Plan:
    """A plan that makes the pass do the same at every size. It never runs."""
    fused = "forced" if choice == "fuse" else baseline
    bare = all_reduce_of(baseline)
    bare = "forced" if choice == "all_reduce only" else bare
    tables = (
        Table("all_reduce_rms_norm", hidden_size, (default_band(fused),), 0, 0),
        Table("all_reduce", hidden_size, (default_band(bare),), 0, 0),
    )
    return Plan(dtype, baseline, tables, f"forces {choice}")


class Compiled:
    """The model's functions, compiled once per choice."""

    def __init__(self, model: Any, group: Group, baseline: str, settings: DecodeSettings) -> None:
        self.model, self.settings = model, settings
        self.cache_name = cache_name(model)
        self._group, self._names, self._baseline = group.name, names_of(group.ranks), baseline
        self._steps: dict[tuple[str, Choice], Callable[..., Tensor]] = {}
        self.passes: dict[Choice, FusionPass] = {}

    def function(self, name: Literal["step", "prefill"], choice: Choice) -> Callable[..., Tensor]:
        """``step(ids, cache)`` or ``prefill(ids)``, each returning the last logits."""
        found = self._steps.get((name, choice))
        if found is None:
            eager: Callable[..., Tensor] = self._step if name == "step" else self._prefill
            found = self._steps[name, choice] = self._compile(eager, choice)
        return found

    def _compile(self, function: Callable[..., Tensor], choice: Choice) -> Callable[..., Tensor]:
        settings = self.settings
        plan = forcing_plan(choice, settings.dtype, settings.hidden_size, self._baseline)
        fusion = self.passes.setdefault(
            choice, FusionPass(self._group, {settings.dtype: plan}, group_names=self._names)
        )
        if settings.compiler == "interpreted":
            backend = interpreted_backend(fusion)
            return torch.compile(function, backend=backend, fullgraph=True)
        return compile_model(function, fusion=fusion, fullgraph=True)

    def _step(self, ids: Tensor, cache: Any) -> Tensor:
        out = self.model(
            input_ids=ids, use_cache=True, logits_to_keep=1, **{self.cache_name: cache}
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _prefill(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits


class Batch:
    """The tokens and the cache of one batch size; arms take turns with them."""

    def __init__(self, compiled: Compiled, size: int) -> None:
        from transformers import StaticCache

        settings, device = compiled.settings, compiled.model.device
        length = settings.context + settings.steps + 2 * _WARM_STEPS
        generator = torch.Generator().manual_seed(size)
        self._vocabulary = compiled.model.config.vocab_size
        self.start = torch.randint(self._vocabulary, (size, 1), generator=generator).to(device)
        self.ids = self.start.clone()
        self.cache: Any = StaticCache(config=compiled.model.config, max_cache_len=length)
        # Outside of any compiled region: the first update allocates the cache.
        compiled.model(input_ids=self.ids, use_cache=True, **{compiled.cache_name: self.cache})
        self._context, self._several = settings.context, len(settings.batches) > 1
        self.reset()

    def reset(self, turn: int = 0) -> None:
        """Back to the first token, another each turn, behind keys and values that mean nothing."""
        self.ids.copy_((self.start + turn) % self._vocabulary)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._context)

    def mark_dynamic(self) -> None:
        """One graph for all batch sizes, where there are several; a batch of one is torch's own."""
        if not self._several:
            return
        tensors = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        for tensor in (self.ids, *tensors):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


class DecodeRunner:
    """Timed decode steps of one arm at one batch size. Constructing is collective."""

    def __init__(
        self, compiled: Compiled, batch: Batch, choice: Choice, communicator: Communicator
    ) -> None:
        self.batch, self.communicator = batch, communicator
        self._steps = compiled.settings.steps
        self._function = compiled.function("step", choice)
        self.logits: Tensor = torch.empty(0)
        self._advance: Callable[[], None] = self._eager
        communicator.activate()
        batch.reset()
        batch.mark_dynamic()
        for _ in range(_WARM_STEPS):
            self._eager()
        if batch.ids.is_cuda:
            # Position and cache are read from memory at each replay.
            self._advance = captured(self.communicator, self._eager, calls=1, warm=1)

    def _eager(self, _: int = 0) -> None:
        self.logits = self._function(self.batch.ids, self.batch.cache)
        self.batch.ids.copy_(self.logits.argmax(-1, keepdim=True))

    def first_logits(self, turn: int) -> Tensor:
        """[batch, vocabulary] after one step, from other first tokens each turn."""
        self.communicator.activate()
        self.batch.reset(turn)
        self._advance()
        return self.logits.float().cpu()

    def time_s(self) -> float:
        """Seconds of all steps on this rank."""
        self.communicator.activate()
        self.batch.reset()
        return timed(self._advance, self._steps, self.batch.ids.is_cuda)


class PrefillRunner:
    """Timed prefills of one arm at one length; not captured, since the GPU is busy for long."""

    def __init__(
        self, compiled: Compiled, tokens: int, choice: Choice, communicator: Communicator
    ) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self._vocabulary = compiled.model.config.vocab_size
        ids = torch.randint(self._vocabulary, (1, tokens), generator=generator)
        self._start = ids.to(compiled.model.device)
        self._ids = self._start.clone()
        self._function = compiled.function("prefill", choice)
        self.communicator = communicator
        self.logits: Tensor = torch.empty(0)
        communicator.activate()
        if len(compiled.settings.prefill_tokens) > 1:
            torch._dynamo.maybe_mark_dynamic(self._ids, 1)
        self._advance()

    def _advance(self) -> None:
        self.logits = self._function(self._ids)

    def first_logits(self, turn: int) -> Tensor:
        """[1, vocabulary] of the last token, of another sequence each turn."""
        self.communicator.activate()
        self._ids.copy_((self._start + turn) % self._vocabulary)
        self._advance()
        return self.logits.float().cpu()

    def time_s(self) -> float:
        """Seconds of one prefill on this rank."""
        self.communicator.activate()
        return timed(self._advance, 1, self._ids.is_cuda)


def timed(advance: Callable[[], None], steps: int, on_gpu: bool) -> float:
    """Seconds of ``steps`` calls, from an idle device to an idle device."""
    if on_gpu:
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    for _ in range(steps):
        advance()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s
