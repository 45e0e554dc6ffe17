"""Layer specs: Megatron's own GPT specs with each MoE layer's FFN replaced by a MixMoELayer.

The only file that knows how Megatron 0.19 describes a model. `mixmoe_decoder_block_spec(config, vp_stage=...)` serves
any stage, dense included, and has the form that Megatron's GPTModelBuilder calls. For a stock `pretrain_gpt.py --spec`
see `integrations.stock_megatron`, which adds the options, freezing and weights.

Without Transformer Engine the local modules are used, with this package's attention core and RMSNorm.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_submodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mixmoe_megatron.model import lora_linear
from mixmoe_megatron.model.attention import TorchCoreAttention, TorchRMSNorm
from mixmoe_megatron.model.backends import uses_transformer_engine
from mixmoe_megatron.model.frozen_prefix import MixMoETransformerLayer
from mixmoe_megatron.model.moe_layer import MixMoELayer


class SeparateRMSNorm(TorchRMSNorm):
    """A norm that Transformer Engine does not fuse into the linear layer behind it but keeps as a module.

    That module has an `_extra_state` in checkpoints. So has this one (always empty): either loads the other's.
    """

    def get_extra_state(self) -> None:
        """Return None: there is nothing to keep."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore what Transformer Engine stored (nothing, without fp8)."""


def mixmoe_decoder_block_spec(
    config: Any, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """Return the decoder of this pipeline stage: dense layers (stage 0), or dense and Mix-MoE layers.

    Args:
        config: a MixMoETransformerConfig, or a model config that holds one as `transformer` (Megatron's
            GPTModelConfig).
        vp_stage: virtual pipeline stage.
        pp_rank: pipeline rank; None: this process's.

    Raises:
        MixMoEError: the config does not go with Mix-MoE (when the layers are built).
    """
    config = getattr(config, "transformer", config)
    use_te = uses_transformer_engine(config)
    block = get_gpt_decoder_block_spec(config, use_te, config.normalization, config.qk_l2_norm, vp_stage, pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[_mixmoe_layer_spec(spec, use_te, config) for spec in block.layer_specs],
        layer_norm=block.layer_norm if use_te else SeparateRMSNorm,
    )


def _mixmoe_layer_spec(spec: ModuleSpec, use_te: bool, config: Any) -> ModuleSpec:
    """Return a copy of a Megatron layer spec (layers share them) with this package's modules in it."""
    submodules: TransformerLayerSubmodules = copy.deepcopy(spec.submodules)
    is_moe = isinstance(submodules.mlp, partial) and submodules.mlp.func is MoELayer
    if is_moe:
        submodules.mlp = MixMoELayer
    if not use_te:
        _use_torch_modules(submodules, is_moe)
    if getattr(config, "lora_rank", 0):
        _add_lora(submodules, use_te)
    return ModuleSpec(module=MixMoETransformerLayer, submodules=submodules, params=dict(spec.params))


def _add_lora(submodules: TransformerLayerSubmodules, use_te: bool) -> None:
    """Put LoRA beside the linear layers; A reads what the norm gives, so no norm can be a part of a linear layer."""
    if use_te:
        column, row = lora_linear.TELoRAColumnParallelLinear, lora_linear.TELoRARowParallelLinear
        submodules.input_layernorm = submodules.pre_mlp_layernorm = TorchRMSNorm
        submodules.sharded_state_dict_keys_map = get_gpt_layer_local_submodules().sharded_state_dict_keys_map
    else:
        column, row = lora_linear.LoRAColumnParallelLinear, lora_linear.LoRARowParallelLinear
    attention, mlp = submodules.self_attention.submodules, submodules.mlp
    attention.linear_qkv, attention.linear_proj = column, row
    linear = replace(mlp.keywords["submodules"], linear_fc1=column, linear_fc2=row)
    submodules.mlp = partial(mlp.func, **{**mlp.keywords, "submodules": linear})


def _use_torch_modules(submodules: TransformerLayerSubmodules, is_moe: bool) -> None:
    submodules.input_layernorm = TorchRMSNorm
    submodules.pre_mlp_layernorm = SeparateRMSNorm if is_moe else TorchRMSNorm
    attention = submodules.self_attention.submodules
    if attention.core_attention is DotProductAttention:
        attention.core_attention = TorchCoreAttention
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name, IdentityOp) is not IdentityOp:
            setattr(attention, name, SeparateRMSNorm)
    if is_moe:
        # Transformer Engine fuses the norm before a dense FFN into it, never the one before experts: same keys there.
        keys = submodules.sharded_state_dict_keys_map
        submodules.sharded_state_dict_keys_map = {k: v for k, v in keys.items() if k != "pre_mlp_layernorm."}
