"""Layer specs: Megatron's own GPT specs with each MoE layer's FFN replaced by a MixMoELayer.

The only file that knows how Megatron 0.19 describes a model. Three ways in:

- `mixmoe_decoder_block_spec(config, vp_stage=...)`: any stage, dense included; what our training uses, and what a
  caller of the form `spec(model_config, vp_stage=...)` (Megatron 0.19's GPTModelBuilder) can call.
- `stage1` and `stage2`: layer specs for a stock `pretrain_gpt.py --spec mixmoe_megatron.layer_specs stage1`, which
  takes the object as it is and gives it a plain TransformerConfig. Options are then the preset `recommended`, with n
  and k from --num-experts and --moe-router-topk (which count both groups) and the layers from --moe-layer-freq.

Without Transformer Engine the local modules are used, with this package's attention core and RMSNorm.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_decoder_layer_specs
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank

from mixmoe_megatron.attention import TorchCoreAttention, TorchRMSNorm
from mixmoe_megatron.backends import uses_transformer_engine
from mixmoe_megatron.frozen_prefix import MixMoETransformerLayer
from mixmoe_megatron.moe_layer import MixMoELayer, mixmoe_submodules


def mixmoe_decoder_block_spec(
    config: Any, vp_stage: int | None = None, pp_rank: int | None = None, mixmoe_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the decoder of this pipeline stage: dense layers (stage 0), or dense and Mix-MoE layers.

    Args:
        config: a MixMoETransformerConfig; a plain TransformerConfig with `mixmoe_stage`; or a model config that holds
            one of them as `transformer` (Megatron's GPTModelConfig).
        vp_stage: virtual pipeline stage.
        pp_rank: pipeline rank; None: this process's.
        mixmoe_stage: 1 or 2, needed for a plain TransformerConfig with experts.

    Raises:
        MixMoEError: the config does not go with Mix-MoE (when the layers are built).
    """
    config = getattr(config, "transformer", config)
    use_te = uses_transformer_engine(config)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    return TransformerBlockSubmodules(
        layer_specs=[_mixmoe_layer_spec(spec, use_te, mixmoe_stage) for spec in block.layer_specs],
        layer_norm=block.layer_norm if use_te else TorchRMSNorm,
    )


def _mixmoe_layer_spec(spec: ModuleSpec, use_te: bool, mixmoe_stage: int | None) -> ModuleSpec:
    """Return a copy of a Megatron layer spec (they are shared) with this package's modules in it."""
    submodules: TransformerLayerSubmodules = copy.copy(spec.submodules)
    is_moe = isinstance(submodules.mlp, partial) and submodules.mlp.func is MoELayer
    if is_moe:
        submodules.mlp = partial(MixMoELayer, submodules=mixmoe_submodules(mixmoe_stage), mixmoe_stage=mixmoe_stage)
    if not use_te:
        _use_torch_modules(submodules, is_moe)
    return ModuleSpec(module=MixMoETransformerLayer, submodules=submodules, params=dict(spec.params))


def _use_torch_modules(submodules: TransformerLayerSubmodules, is_moe: bool) -> None:
    submodules.input_layernorm = TorchRMSNorm
    submodules.pre_mlp_layernorm = TorchRMSNorm
    attention = copy.copy(submodules.self_attention)
    attention.submodules = copy.copy(attention.submodules)
    if attention.submodules.core_attention is DotProductAttention:
        attention.submodules.core_attention = TorchCoreAttention
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention.submodules, name, IdentityOp) is not IdentityOp:
            setattr(attention.submodules, name, TorchRMSNorm)
    submodules.self_attention = attention
    if is_moe:
        # Transformer Engine fuses the norm before a dense FFN into it, never the one before experts: same keys there.
        keys = submodules.sharded_state_dict_keys_map
        submodules.sharded_state_dict_keys_map = {k: v for k, v in keys.items() if k != "pre_mlp_layernorm."}


class StockTransformerLayer(MixMoETransformerLayer):
    """A layer that finds out by its number whether it is a dense or a Mix-MoE layer.

    Stock `pretrain_gpt.py --spec` takes one spec for all layers, before any config exists.

    Args:
        config: a plain TransformerConfig.
        submodules: must be None.
        layer_number: 1-based, within the pipeline stage unless `add_layer_offset` is False.
        mixmoe_stage: 1 or 2.
        kwargs: TransformerLayer's other arguments.

    Raises:
        MixMoEError: the config does not go with Mix-MoE.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules | None = None,
        layer_number: int = 1,
        mixmoe_stage: int | None = None,
        **kwargs: Any,
    ):
        use_te = uses_transformer_engine(config)
        offset = 0
        if kwargs.get("add_layer_offset", True):
            groups = kwargs.get("pg_collection")
            pp_rank = get_pg_rank(groups.pp) if groups is not None else None
            offset = get_transformer_layer_offset(config, kwargs.get("vp_stage"), pp_rank)
        specs = get_gpt_decoder_layer_specs(
            config, use_te, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
        )
        spec = _mixmoe_layer_spec(specs[layer_number - 1 + offset], use_te, mixmoe_stage)
        super().__init__(config, spec.submodules, layer_number=layer_number, **kwargs)


#: For a stock `pretrain_gpt.py --spec mixmoe_megatron.layer_specs stage1` (LM experts) or `stage2` (LM and MT).
stage1 = ModuleSpec(module=StockTransformerLayer, params={"mixmoe_stage": 1})
stage2 = ModuleSpec(module=StockTransformerLayer, params={"mixmoe_stage": 2})
