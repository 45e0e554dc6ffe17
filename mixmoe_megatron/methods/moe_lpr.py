"""MoE-LPR: copies of the FFN learn beside the FFN itself, which stays; then the router alone learns when to take it.

The base's FFN is the first LM expert, a part of its own (option `base_expert`) that neither phase trains. In the first
phase the other copies and the router learn new languages. The second reviews text of the original languages with that
of the new ones: its loss asks the router to give tokens of the original languages to the base's FFN.

Source: MoE-LPR (arXiv:2408.11396) and its released code. Deviates: D16 (model/README.md).
"""

from __future__ import annotations

import math

from mixmoe_megatron.methods.base import Method, Phase
from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.methods.moe import PLAIN_ROUTER

EXPERTS = Phase(
    name="lpr_experts",
    groups=GROUPS[:1],
    trains=("LM experts", "LM routers"),
    starts_from=("lpr_experts",),
    data=("monolingual", "parallel"),
    made_by="convert a dense model with checkpoints_conversion/hf_to_mixmoe.py --method moe_lpr.",
)
ROUTER = Phase(
    name="lpr_router",
    groups=GROUPS[:1],
    trains=("LM routers",),
    starts_from=("lpr_experts",),
    data=("monolingual",),
    made_by="train it (tools/pretrain_mixmoe.py --phase lpr_router).",
    defaults={"moe_aux_loss_coeff": 0.0, "lpr_coeff": 0.1},
)
MOE_LPR = Method(
    "moe_lpr",
    "the FFN and 3 copies of it that learn, top-2, then the router alone on text of old and new languages",
    (EXPERTS, ROUTER),
    {
        **PLAIN_ROUTER,
        "num_experts_per_group": 4,
        "topk_per_group": 2,
        "expert_init": "copy",
        "expert_scale": 1.0,
        "base_expert": True,
        "router_init_std": math.sqrt(2),  # what xavier_normal gives, but for n beside H
    },
    exports_as="qwen2_moe",
)
