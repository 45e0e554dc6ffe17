"""LLaMA-MoE v2, vanilla: every layer's FFN cut into 8 experts of consecutive neurons, top-2 of them, all trained.

Source: LLaMA-MoE v2 (arXiv:2411.15708) and its released code. Deviates: D15 (model/README.md). Not there: its residual
variant, neurons chosen by importance for each cluster, and experts of the attention.
"""

from __future__ import annotations

import math

from mixmoe_megatron.methods.base import ALL_PARAMETERS, Method, Phase
from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.methods.moe import PLAIN_ROUTER

TRAINED = Phase(
    name="llama_moe_v2",
    groups=GROUPS[:1],
    trains=(ALL_PARAMETERS,),
    starts_from=("llama_moe_v2",),
    data=("monolingual", "parallel"),
    made_by="convert a dense model with checkpoints_conversion/hf_to_mixmoe.py --method llama_moe_v2.",
)
LLAMA_MOE_V2 = Method(
    "llama_moe_v2",
    "every FFN cut into 8 experts, top-2, all trained",
    (TRAINED,),
    {
        **PLAIN_ROUTER,
        "num_experts_per_group": 8,
        "topk_per_group": 2,
        "moe_every": 1,
        "expert_init": "slice",
        "expert_scale": 4.0,
        "router_init_std": 1 / math.sqrt(3),
    },
    exports_as="qwen2_moe",
)
