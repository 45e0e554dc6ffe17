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

_BOTH = ("LM experts", "MT experts", "LM routers", "MT routers")
#: Ablation: stage 2 with nothing of the mixture frozen, so that translation may change the LM experts.
STAGE2_UNFROZEN = Phase("stage2_unfrozen", GROUPS, _BOTH, ("stage1",), ("parallel",), STAGE2.made_by)
#: Ablation: both groups from the start, without stage 1.
ONE_STAGE = Phase(
    "one_stage",
    GROUPS,
    _BOTH,
    ("upcycled",),
    ("parallel",),
    "train it (tools/pretrain_mixmoe.py --phase one_stage).",
)
MIXMOE = Method(
    "mixmoe",
    "mixture-of-experts of LM and MT groups, the rest frozen",
    (UPCYCLED, STAGE1, STAGE2, STAGE2_UNFROZEN, ONE_STAGE),
)
