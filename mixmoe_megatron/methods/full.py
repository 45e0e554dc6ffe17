"""Full fine-tuning: every parameter of the dense model, which stays dense; what Mix-MoE is compared with."""

from __future__ import annotations

from mixmoe_megatron.methods.base import ALL_PARAMETERS, Method, Phase

DENSE = Phase(
    name="dense",
    groups=(),
    trains=(ALL_PARAMETERS,),
    starts_from=("dense",),
    data=("monolingual", "parallel"),
    made_by="convert one with checkpoints_conversion/hf_to_mixmoe.py --dense.",
)
FULL = Method("full", "full fine-tuning of the dense model", (DENSE,))
