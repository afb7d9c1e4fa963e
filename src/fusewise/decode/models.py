"""transformers' own models from a configuration: random weights, split over the ranks of a group.

The model code is transformers', unchanged; so the fusion pass meets code that knows nothing of
it. Nothing is downloaded: shapes come from here, weights from a seeded generator.
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fusewise.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import torch

Family = Literal["Qwen3", "Qwen3Moe", "Llama", "Gemma3Text"]

_ATTENTION_TINY = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
}  # fmt: skip
_EXPERTS_TINY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class ModelShape:
    """What a model is made of; ``settings`` are transformers' own names."""

    name: str
    family: Family
    hidden_size: int
    num_layers: int
    settings: dict[str, int | float]


# Qwen3-8B and Qwen3-30B-A3B as their published config.json files have them.
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", "Qwen3", 64, 2, {"intermediate_size": 96, **_ATTENTION_TINY}),
        ModelShape(
            "tiny-moe", "Qwen3Moe", 64, 2,
            {"intermediate_size": 96, **_ATTENTION_TINY, **_EXPERTS_TINY},
        ),
        ModelShape("tiny-llama", "Llama", 64, 2, {"intermediate_size": 96, **_ATTENTION_TINY}),
        ModelShape(
            "tiny-gemma3", "Gemma3Text", 64, 2, {"intermediate_size": 96, **_ATTENTION_TINY}
        ),
        ModelShape(
            "qwen3-8b", "Qwen3", 4096, 36,
            {
                "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 128, "vocab_size": 151936,
            },
        ),
        ModelShape(
            "qwen3-30b-a3b", "Qwen3Moe", 2048, 48,
            {
                "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
                "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
                "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            },
        ),
    )
}  # fmt: skip


def shape_named(name: str, num_layers: int | None = None) -> ModelShape:
    """A known shape, with fewer layers if asked for.

    Raises:
        InputError: no such shape, or no such number of layers.
    """
    if name not in SHAPES:
        raise InputError("unknown model", expected=f"one of {', '.join(SHAPES)}", got=repr(name))
    shape = SHAPES[name]
    if num_layers is None:
        return shape
    if not 1 <= num_layers <= shape.num_layers:
        expected = f"1 to {shape.num_layers}, of {name}"
        raise InputError("layers out of range", expected=expected, got=str(num_layers))
    return ModelShape(shape.name, shape.family, shape.hidden_size, num_layers, shape.settings)


def check_split(shape: ModelShape, world_size: int) -> None:
    """Whether the model's heads can be shared out to so many ranks.

    Raises:
        InputError: not evenly; names the numbers that can.
    """
    names = ("num_attention_heads", "num_key_value_heads")
    most = math.gcd(*(int(shape.settings[name]) for name in names))
    if most % world_size:
        fitting = [str(n) for n in range(2, most + 1) if most % n == 0]
        raise InputError(
            f"the heads of {shape.name} cannot be shared out",
            expected=f"{' or '.join(fitting)} ranks",
            got=str(world_size),
            hint="Pass --tp, or another --model.",
        )


def build_model(
    shape: ModelShape, world_size: int, dtype: torch.dtype, max_positions: int, seed: int = 0
) -> Any:
    """The model in evaluation mode, tensor-parallel over the default process group.

    Every rank draws the same generator, so replicated weights are equal on all ranks. Norm
    weights are drawn too: ones and zeros would hide a wrong weight.

    Args:
        shape: what to build.
        world_size: ranks of the default group; 1 splits nothing.
        dtype: of weights and activations.
        max_positions: longest sequence.
        seed: of the weights.

    Raises:
        UnavailableError: transformers is missing, or too old to split a model built in memory.
    """
    import torch

    try:
        import transformers
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise UnavailableError(
            "decode needs transformers",
            got=str(error),
            hint="Install it with: pip install 'fusewise[decode]'",
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = getattr(transformers, f"{shape.family}Config")(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        max_position_embeddings=max_positions,
        **shape.settings,
    )
    architecture = getattr(transformers, f"{shape.family.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(seed)
    split = {"distributed_config": DistributedConfig(tp_size=world_size)} if world_size > 1 else {}
    with warnings.catch_warnings():
        # Sharded weights may be drawn alike on all ranks, which does not matter here.
        warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)
        model = architecture.from_pretrained(
            None, config=config, state_dict={}, dtype=dtype, **split
        )
    _draw_norm_weights(model, seed)
    for module in model.modules():
        # transformers sums gradients of what it does not split, in hooks that torch 2.11 cannot
        # compile; nobody asks for a gradient here.
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return model.eval()


def cache_name(model: Any) -> str:
    """What the model's ``forward`` calls its cache; transformers 5.24 renamed it."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def _draw_norm_weights(model: Any, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                drawn = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.add_(drawn.to(parameter.device, parameter.dtype))
