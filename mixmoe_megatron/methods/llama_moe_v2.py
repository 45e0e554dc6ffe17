"""LLaMA-MoE v2: FFNs cut into 8 slices of consecutive neurons, all trained, in the paper's two forms.

Vanilla: in every layer the slices are experts, top-2 of them. Residual: in all layers but the first and the last, the
first slice works on every token (option `shared_experts`) and the others are experts, top-1 of them.

Source: LLaMA-MoE v2 (arXiv:2411.15708) and its released code. Deviates: D15 (model/README.md). Not there: neurons
chosen by importance for each cluster, and experts of the attention.
"""

from __future__ import annotations

import math

from mixmoe_megatron.methods.base import ALL_PARAMETERS, Method, Phase
from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.methods.moe import PLAIN_ROUTER


def _trained(name: str) -> Phase:
    return Phase(
        name=name,
        groups=GROUPS[:1],
        trains=(ALL_PARAMETERS,),
        starts_from=(name,),
        data=("monolingual", "parallel"),
        made_by=f"convert a dense model with checkpoints_conversion/hf_to_mixmoe.py --method {name}.",
    )


_SLICES = {**PLAIN_ROUTER, "moe_every": 1, "expert_init": "slice", "router_init_std": 1 / math.sqrt(3)}
LLAMA_MOE_V2 = Method(
    "llama_moe_v2",
    "every FFN cut into 8 experts, top-2, all trained",
    (_trained("llama_moe_v2"),),
    {**_SLICES, "num_experts_per_group": 8, "topk_per_group": 2, "expert_scale": 4.0},
    exports_as="qwen2_moe",
)
LLAMA_MOE_V2_RESIDUAL = Method(
    "llama_moe_v2_residual",
    "inner FFNs cut into a shared expert and 7 others, top-1, all trained",
    (_trained("llama_moe_v2_residual"),),
    {
        **_SLICES,
        "num_experts_per_group": 7,
        "topk_per_group": 1,
        "shared_experts": 1,
        "moe_layer_placement": "inner",
        "expert_scale": 1.0,
        "renormalize_topk": False,  # of one expert it would be 1 and leave the router no gradient
    },
    exports_as="qwen2_moe",
)
