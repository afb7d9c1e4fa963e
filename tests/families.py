"""transformers' families as tiny configurations, and what the pass must make of each.

One layer each. Expected is what becomes of every all-reduce, in graph order; what stands for a
reason is exact.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any
from unittest.mock import patch

HIDDEN = 64
FUSE, JOIN = "fuse", "join"
LAYER_NORM = "LayerNorm follows, not RMSNorm"
SCALED = "scaled by a tensor of one element"  # Gemma's embedding
NO_NORM = "no RMSNorm follows, but aten::mm"  # a layer that normalises only its results
SLICES = "no RMSNorm follows, but aten::sum"  # one all-reduce per expert, summed over experts

_DENSE: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    "intermediate_size": 96, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {
    **_DENSE, **_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 0,
}  # fmt: skip
_LATENT = {
    **_SHARED, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16,
    "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
_ROUTED = {**_DENSE, **_EXPERTS, "num_experts": 4}
_BIAS_PLAN = {
    "model.embed_tokens": "embedding_rowwise",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}

# name: (settings, what becomes of each all-reduce: the embedding's, attention's, the MLP's)
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Llama": (_DENSE, [FUSE] * 3),
    "Llama, biases": ({**_DENSE, "attention_bias": True, "mlp_bias": True}, [FUSE] * 3),
    "Qwen2": (_DENSE, [FUSE] * 3),
    "Qwen3": (_DENSE, [FUSE] * 3),
    "Gemma": (_DENSE, [SCALED, FUSE, FUSE]),
    "Gemma3Text": (_DENSE, [SCALED, FUSE, FUSE]),
    "Phi3": (_DENSE, [FUSE] * 3),
    "Olmo2": (_DENSE, [NO_NORM, FUSE, FUSE]),
    "Exaone4": (_DENSE, [NO_NORM, FUSE, FUSE]),
    "Granite": (
        {**_DENSE, "residual_multiplier": 0.22, "embedding_multiplier": 4.0},
        [FUSE] + ["scaled by 0.22, which is no power of two"] * 2,
    ),
    "Granite, 0.25": ({**_DENSE, "residual_multiplier": 0.25}, [FUSE] * 3),
    "GraniteMoe": ({**_DENSE, "num_local_experts": 4}, [FUSE] * 2),
    "NanoChat": (_DENSE, [FUSE] * 3),
    "Qwen2Moe": ({**_ROUTED, "shared_expert_intermediate_size": 32}, [FUSE] * 3),
    "Qwen3Moe": (_ROUTED, [FUSE] * 3),
    "Mixtral": ({**_DENSE, "num_local_experts": 4}, [FUSE] * 3),
    "MiniMaxM2": ({**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}, [FUSE] * 3),
    "GptOss": ({**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}, [FUSE] * 2),
    "DeepseekV3": (_LATENT, [FUSE, FUSE, JOIN]),
    "Glm4Moe": (_SHARED, [FUSE] * 3 + [JOIN]),
    "Qwen3Next": (
        {
            **_ROUTED, "shared_expert_intermediate_size": 32, "layer_types": ["full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
        [FUSE] * 3 + [JOIN],
    ),
    "Llama4Text": (
        {**_DENSE, "intermediate_size_mlp": 96, "num_local_experts": 2},
        [FUSE, FUSE, SLICES, FUSE],
    ),
    "Starcoder2": (_DENSE, [LAYER_NORM] * 3),
    "Cohere2": (_DENSE, [LAYER_NORM] * 3),
}  # fmt: skip
PLANS = {"GptOss": _BIAS_PLAN}  # transformers splits its experts only, or only its embedding


@functools.cache
def _mesh(world_size: int) -> Any:
    """transformers' mesh, one for all models: nine groups, whose threads wake every 10 ms."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    return initialize_distributed_mesh(DistributedConfig(tp_size=world_size))


def build(name: str, world_size: int) -> Any:
    """A family's model, split over the default group, bf16, with drawn norm weights and biases."""
    import torch
    import transformers
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig, mixin

    family = name.partition(",")[0]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=HIDDEN, num_hidden_layers=1, max_position_embeddings=64, **FAMILIES[name][0]
    )
    architecture = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    plan = {"tp_plan": PLANS[name]} if name in PLANS else {}
    split = DistributedConfig(tp_size=world_size, **plan)
    mesh = _mesh(world_size)
    torch.manual_seed(0)
    with (
        patch.object(mixin, "initialize_distributed_mesh", lambda _: mesh),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # transformers and DTensor, about weights that are drawn
        model = architecture.from_pretrained(
            None, config=config, state_dict={}, dtype=torch.bfloat16, distributed_config=split
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "o_proj.bias")):
                drawn = torch.rand(parameter.shape, generator=generator) - 0.5
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.add_(drawn.to(parameter.dtype))
    for module in model.modules():
        if hasattr(module, "sinks"):  # one per head; no plan knows how to split it
            mine = module.sinks.detach().chunk(world_size)[torch.distributed.get_rank()]
            module.sinks = torch.nn.Parameter(mine.clone())
    return model.eval()
