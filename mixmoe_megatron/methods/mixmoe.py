"""Mix-MoE: LM experts learn from monolingual text, then MT experts beside them from parallel text.

Source: Mix-MoE (arXiv:2605.24681) Table I.
"""

from __future__ import annotations

from mixmoe_megatron.methods.base import Method, Phase

#: Names of the expert groups, in logical order.
GROUPS = ("lm", "mt")

UPCYCLED = Phase(
    name="upcycled",
    groups=GROUPS[:1],
    trains=(),
    starts_from=("dense",),
    data=(),
    made_by="upcycle a dense model with checkpoints_conversion/hf_to_mixmoe.py.",
)
STAGE1 = Phase(
    name="stage1",
    groups=GROUPS[:1],
    trains=("LM experts", "LM routers"),
    starts_from=("upcycled",),
    data=("monolingual",),
    made_by="train stage 1 first (tools/pretrain_mixmoe.py --mixmoe-stage 1).",
)
STAGE2 = Phase(
    name="stage2",
    groups=GROUPS,
    trains=("MT experts", "MT routers"),
    starts_from=("stage1",),
    data=("parallel",),
    made_by="train stage 2 first (tools/pretrain_mixmoe.py --mixmoe-stage 2).",
)
MIXMOE = Method("mixmoe", "mixture-of-experts of LM and MT groups, the rest frozen", (UPCYCLED, STAGE1, STAGE2))
