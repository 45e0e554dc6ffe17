"""The plain reference of a Mix-MoE layer."""

from __future__ import annotations

from mixmoe_megatron.hf.configuration_mixmoe import MixMoEConfig
from mixmoe_megatron.hf.modeling_mixmoe import MixMoEBlock
from mixmoe_megatron.model.moe_layer import MixMoELayer


def reference_block(layer: MixMoELayer, hidden_size: int) -> MixMoEBlock:
    """Return the Hugging Face block of the same sizes and options as a Megatron layer; its values are its own."""
    options = layer.config.options()
    config = MixMoEConfig(
        hidden_size=hidden_size,
        num_hidden_layers=2,
        moe_layers=[1],
        stage=layer.stage,
        num_experts_per_group=options.num_experts_per_group,
        topk_per_group=options.topk_per_group,
        intermediate_size=layer.config.ffn_hidden_size,
        moe_intermediate_size=layer.config.moe_ffn_hidden_size,
        group_combine=options.group_combine,
        router_prob_scaling=options.router_prob_scaling,
        expert_scale=options.resolved_expert_scale,
        router_bias=options.router_bias,
    )
    return MixMoEBlock(config)
