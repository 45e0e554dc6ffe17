"""Tensors of an exported model under fairseq2's names, and back: renamed, and the groups split or put together."""

from __future__ import annotations

import re
from typing import Any

import torch
from fairseq2.models.utils.checkpoint import convert_state_dict, create_reverse_key_map

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig
from mixmoe_megatron.methods.mixmoe import GROUPS

_LAYER = r"^model\.layers\.([0-9]+)\."
_OURS = r"decoder.layers.\1."
#: Hugging Face -> fairseq2; the first pattern that fits counts.
_NAMES = {
    _LAYER + r"self_attn\.o_proj\.": _OURS + "self_attn.output_proj.",
    _LAYER + r"self_attn\.": _OURS + "self_attn.",
    _LAYER + r"post_attention_layernorm\.": _OURS + "ffn_layer_norm.",
    _LAYER + r"input_layernorm\.": _OURS + "self_attn_layer_norm.",
    _LAYER + r"mlp\.up_proj\.": _OURS + "ffn.inner_proj.",
    _LAYER + r"mlp\.down_proj\.": _OURS + "ffn.output_proj.",
    _LAYER + r"mlp\.": _OURS + "ffn.",
    r"^model\.norm\.": "decoder.layer_norm.",
    r"^model\.embed_tokens\.": "decoder_frontend.embed.",
    r"^lm_head\.": "final_proj.",
}
_HF_EMBEDDING, _EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "decoder_frontend.embed.weight", "final_proj.weight"
_ALL_GROUPS = re.compile(r"(decoder\.layers\.[0-9]+\.ffn\.)((?:router|experts)\..+)")
_ONE_GROUP = re.compile(r"(decoder\.layers\.[0-9]+\.ffn\.)(lm|mt)\.(.+)")


def from_any_state_dict(state_dict: dict[str, Any], config: MixMoEModelConfig) -> dict[str, Any]:
    """Return the state dict of a fairseq2 model from that of an export or of fairseq2 itself.

    A model of stage 2 may start from one of stage 1: its MT group is then a copy of the LM group.

    Source: Mix-MoE (arXiv:2605.24681) eq. 1-2.

    Args:
        state_dict: tensors by name.
        config: of the model that takes them.

    Raises:
        MixMoEError: stage 2 is to start from stage 1 with other routers than copied ones, or stage 1 from stage 2.
    """
    if _HF_EMBEDDING in state_dict:
        state_dict = _split_groups(convert_state_dict(state_dict, _NAMES), config.num_experts_per_group)
    else:
        state_dict = dict(state_dict)
    has_mt = any(match[2] == "mt" for match in map(_ONE_GROUP.fullmatch, state_dict) if match)
    if config.stage == 2 and not has_mt:
        state_dict |= _copied_lm_group(state_dict, config)
    elif config.stage == 1 and has_mt:
        raise MixMoEError("The weights hold MT experts, but the model's configuration says stage 1: set stage to 2.")
    if config.tie_word_embeddings:
        state_dict[_OUTPUT] = state_dict[_EMBEDDING]
    return state_dict


def to_hf_state_dict(state_dict: dict[str, Any], config: MixMoEModelConfig) -> dict[str, Any]:
    """Return the state dict of the Hugging Face model, in the dtype that the configuration names; routers are float32.

    Args:
        state_dict: of a fairseq2 model, LM before MT.
        config: of that model.
    """
    whole: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        match = _ONE_GROUP.fullmatch(name)
        key = match[1] + match[3] if match else name
        whole[key] = torch.cat([whole[key], tensor]) if key in whole else tensor
    if config.tie_word_embeddings:
        whole.pop(_OUTPUT, None)
    dtype = getattr(torch, config.dtype or "float32")
    renamed = convert_state_dict(whole, create_reverse_key_map(_NAMES))
    return {name: t.to(torch.float32 if ".router." in name else dtype) for name, t in renamed.items()}


def _split_groups(state_dict: dict[str, Any], experts: int) -> dict[str, Any]:
    """Return the state dict with a tensor [n, ...] for each group where one [E, ...] holds all; n is `experts`."""
    split: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        if match := _ALL_GROUPS.fullmatch(name):
            parts = zip(GROUPS, tensor.split(experts), strict=False)  # stage 1 has one group
            split |= {f"{match[1]}{group}.{match[2]}": part for group, part in parts}
        else:
            split[name] = tensor
    return split


def _copied_lm_group(state_dict: dict[str, Any], config: MixMoEModelConfig) -> dict[str, Any]:
    """Return the MT group's tensors, as stage 2 starts: copies of the LM group's.

    Raises:
        MixMoEError: the model's options want the MT routers drawn anew, which is Megatron's to do.
    """
    if config.mixmoe.get("mt_router_init", "copy") != "copy":
        raise MixMoEError(
            "This model's option mt_router_init is random: make the start of stage 2 with "
            "checkpoints_conversion/add_mt_experts.py and export that."
        )
    matches = filter(None, map(_ONE_GROUP.fullmatch, state_dict))
    return {f"{match[1]}mt.{match[3]}": state_dict[match[0]].clone() for match in matches}
