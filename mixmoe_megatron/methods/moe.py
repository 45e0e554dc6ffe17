"""A plain mixture-of-experts: the base's FFN copied into every expert of some layers, one softmax router over them.

In the model it is Mix-MoE's layer with one group (its experts are called LM experts there), no transform and no bias.

Source: Mix-MoE (arXiv:2605.24681) section IV ("MoE": PT, SFT, PT+SFT); copies as in Sparse Upcycling
(arXiv:2212.05055), k and renormalised probabilities as in transformers' Qwen2Moe, which is what its exports are.
"""

from __future__ import annotations

from mixmoe_megatron.methods.base import ALL_PARAMETERS, Method, Phase
from mixmoe_megatron.methods.mixmoe import GROUPS

_DATA = ("monolingual", "parallel")
_MADE_BY = "convert a dense model with checkpoints_conversion/hf_to_mixmoe.py --method moe."

#: What the paper says: the parameters of the mixture train.
EXPERTS = Phase("moe", GROUPS[:1], ("LM experts", "LM routers"), ("moe",), _DATA, _MADE_BY)
#: What most released code does.
EVERYTHING = Phase("moe_all", GROUPS[:1], (ALL_PARAMETERS,), ("moe", "moe_all"), _DATA, _MADE_BY)

#: A layer of one group with a linear router, whose chosen probabilities sum to 1.
PLAIN_ROUTER = {"spectral_transform": "none", "router_bias": False, "renormalize_topk": True, "router_init_std": None}

MOE = Method(
    "moe",
    "a plain mixture of copies of the FFN, top-2 of 8",
    (EXPERTS, EVERYTHING),
    {
        **PLAIN_ROUTER,
        "num_experts_per_group": 8,
        "topk_per_group": 2,
        "expert_init": "copy",
        "expert_scale": 1.0,  # the weights of the chosen copies sum to 1: the layer starts as the FFN
    },
    exports_as="qwen2_moe",
)
