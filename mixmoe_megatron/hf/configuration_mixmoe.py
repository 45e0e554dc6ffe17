"""Configuration of the Hugging Face Mix-MoE model, for transformers 4.57 and 5.x.

This file is copied into every exported checkpoint (`trust_remote_code=True`), so it imports transformers only.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import transformers
from transformers import PretrainedConfig

BASE_MODEL_TYPES = ("llama", "qwen2")
GROUP_COMBINES = ("mean", "sum")
AUTO_MAP = {
    "AutoConfig": "configuration_mixmoe.MixMoEConfig",
    "AutoModel": "modeling_mixmoe.MixMoEModel",
    "AutoModelForCausalLM": "modeling_mixmoe.MixMoEForCausalLM",
}
_DEFAULTS: dict[str, Any] = {
    "base_model_type": "llama",
    "moe_layers": None,
    "stage": 2,
    "num_experts_per_group": 4,
    "topk_per_group": 1,
    "num_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "group_combine": "mean",
    "router_prob_scaling": True,
    "renormalize_topk": False,
    "expert_scale": None,
    "router_bias": True,
    "mixmoe_aux_loss_coef": 0.0,
    "output_router_logits": False,
    "mixmoe": None,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 0,
    "layer_types": None,
}
# Fields transformers' own base class looks after.
_SPECIAL_DEFAULTS: dict[str, Any] = {
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "auto_map": AUTO_MAP,
}
# Fields of a base model's config that describe the base checkpoint, not the architecture.
_NOT_INHERITED = ("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path")
_IS_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# Where packed experts cannot be sharded (see below), tensor parallelism keeps them whole on each rank.
_EXPERT_TP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}
_EXPERT_EP_PLAN: Any = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}
_PP_PLAN: Any = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


def _can_shard_packed_experts() -> bool:
    """Tell whether tensor parallelism can shard gate_up_proj: transformers 5.x, with a torch later than 2.9.

    In torch 2.9 `_StridedShard` is a kind of `Shard`; transformers then reads wrong rows of the checkpoint, in silence.
    """
    if not _IS_TRANSFORMERS_5:
        return False
    try:
        from torch.distributed.tensor.placement_types import Shard, _StridedShard
    except ImportError:  # a torch without distributed
        return False
    return not issubclass(_StridedShard, Shard)


class MixMoEConfig(PretrainedConfig):
    """A Llama or Qwen2 configuration plus the Mix-MoE fields.

    The RoPE settings have one record, `rope_parameters` (transformers 5.x), in config.json too; `rope_theta` and
    `rope_scaling` (transformers 4.57) are views of it. A `rope_scaling` in config.json would keep transformers 5.x from
    loading the tokenizer for those who do not trust remote code.

    Source: Mix-MoE (arXiv:2605.24681), section III.

    Args:
        base_model_type: "llama" or "qwen2": which decoder layer, attention and RMSNorm.
        moe_layers: 0-based indices of the layers whose FFN is a Mix-MoE block. None: the last of every four layers, of
            fewer than four the last.
        stage: 1 (LM experts only) or 2 (LM and MT experts).
        num_experts_per_group: experts in each group.
        topk_per_group: experts chosen in each group for each token.
        num_experts: derived, num_experts_per_group * stage. Written for tools; must agree when given.
        num_experts_per_tok: derived, topk_per_group * stage. Written for tools; must agree when given.
        moe_intermediate_size: FFN width of one expert. None: intermediate_size / num_experts_per_group.
        group_combine: how the LM and MT outputs combine, "mean" or "sum".
        router_prob_scaling: scale each expert's output by expert_scale * its probability; False: leave it plain.
        renormalize_topk: divide the probabilities of a group's chosen experts by their sum.
        expert_scale: the factor s in s * p * E(h). None: num_experts_per_group, which makes s * p = 1 at uniform p.
        router_bias: whether the router has a bias.
        mixmoe_aux_loss_coef: coefficient of the load-balancing aux loss added to the training loss. An own name,
            because trainers add Mixtral's aux loss, wrong for two groups, when they see router_aux_loss_coef.
        output_router_logits: return the router logits of every MoE layer by default.
        mixmoe: all training options of mixmoe_megatron, for the record. The model does not read it.
        rope_theta, rope_scaling, rope_parameters: RoPE settings in either style; rope_parameters wins.
        layer_types, sliding_window, use_sliding_window, max_window_layers: sliding-window attention (Qwen2 only).
        kwargs: the other fields of a Llama or Qwen2 configuration, with their usual meaning.

    Raises:
        ValueError: a field is outside its range or contradicts another; the message names it.
    """

    model_type = "mixmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan = {**_TP_PLAN, **_EXPERT_TP_PLAN} if _can_shard_packed_experts() else _TP_PLAN
    base_model_ep_plan = _EXPERT_EP_PLAN if _IS_TRANSFORMERS_5 else None
    base_model_pp_plan = _PP_PLAN
    _auto_class = "AutoConfig"  # save_pretrained ships this file

    def __init__(self, **kwargs: Any):
        fields = {name: kwargs.pop(name, default) for name, default in _DEFAULTS.items()}
        _fill_in_base_fields(fields)
        _fill_in_mixmoe_fields(fields)
        _check(fields)
        for name, value in fields.items():
            setattr(self, name, value)
        rope_theta, rope_scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None)
        self.rope_parameters = _rope_parameters(kwargs.pop("rope_parameters", None), rope_theta, rope_scaling)
        for name, default in _SPECIAL_DEFAULTS.items():
            kwargs.setdefault(name, copy.copy(default))
        super().__init__(**kwargs)

    @classmethod
    def from_base_config(cls, base_config: PretrainedConfig | dict[str, Any], **fields: Any) -> MixMoEConfig:
        """Build the Mix-MoE configuration of a dense Llama or Qwen2 model.

        Args:
            base_config: the dense model's configuration, or the content of its config.json (of either major version).
            fields: Mix-MoE fields, and any field of the base to override.

        Returns:
            The configuration, with base_model_type taken from the base.

        Raises:
            ValueError: the base is not a Llama or Qwen2 model, or a field is wrong.
        """
        base = base_config if isinstance(base_config, dict) else base_config.to_dict()
        inherited = {name: value for name, value in base.items() if name not in _NOT_INHERITED}
        if {"rope_theta", "rope_scaling"} & fields.keys() and inherited.get("rope_parameters"):
            scaling = dict(inherited.pop("rope_parameters"))  # would win over the fields, which have the older names
            inherited |= {"rope_theta": scaling.pop("rope_theta", None), "rope_scaling": scaling}
        return cls(**{**inherited, "base_model_type": base.get("model_type"), **fields})

    @property
    def rope_theta(self) -> float:
        """Base of the RoPE frequencies (transformers 4.57's name)."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """RoPE scaling settings, None when there is no scaling (transformers 4.57's name)."""
        if self.rope_parameters["rope_type"] == "default":
            return None
        return {name: value for name, value in self.rope_parameters.items() if name != "rope_theta"}

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = _rope_parameters(None, self.rope_theta, value)


def _fill_in_base_fields(fields: dict[str, Any]) -> None:
    """Derive the Llama or Qwen2 fields that are None."""
    num_layers = fields["num_hidden_layers"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if not fields["use_sliding_window"]:
        fields["sliding_window"] = None
    if fields["base_model_type"] == "llama":
        fields.pop("layer_types")  # transformers takes its presence, even as None, for a mixture of attention types
    elif fields["layer_types"] is None:
        num_full = num_layers if fields["sliding_window"] is None else min(fields["max_window_layers"], num_layers)
        fields["layer_types"] = ["full_attention"] * num_full + ["sliding_attention"] * (num_layers - num_full)


def _fill_in_mixmoe_fields(fields: dict[str, Any]) -> None:
    """Derive the Mix-MoE fields that are None."""
    group, stage, num_layers = fields["num_experts_per_group"], fields["stage"], fields["num_hidden_layers"]
    derived = {
        "moe_layers": range(min(4, num_layers) - 1, num_layers, 4),
        "num_experts": group * stage,
        "num_experts_per_tok": fields["topk_per_group"] * stage,
        "moe_intermediate_size": fields["intermediate_size"] // max(group, 1),
        "expert_scale": group,
        "mixmoe": {},
    }
    for name, value in derived.items():
        if fields[name] is None:
            fields[name] = value
    fields["moe_layers"] = sorted(fields["moe_layers"])
    fields["expert_scale"] = float(fields["expert_scale"])


def _check(fields: dict[str, Any]) -> None:
    """Raise ValueError at the first field that is outside its range or contradicts another."""
    group, top_k, stage = fields["num_experts_per_group"], fields["topk_per_group"], fields["stage"]
    moe_layers, num_layers = fields["moe_layers"], fields["num_hidden_layers"]
    if fields["base_model_type"] not in BASE_MODEL_TYPES:
        raise ValueError(f"base_model_type must be one of {BASE_MODEL_TYPES}, got {fields['base_model_type']!r}.")
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}.")
    if group < 1 or not 1 <= top_k <= group:
        raise ValueError(f"topk_per_group must be in 1..num_experts_per_group, got {top_k} of {group}.")
    for name, wanted in (("num_experts", group * stage), ("num_experts_per_tok", top_k * stage)):
        if fields[name] != wanted:
            raise ValueError(f"{name} must be {wanted} (the number per group times the stage), got {fields[name]}.")
    if not moe_layers:
        raise ValueError(f"moe_layers is empty: a model of {num_layers} layers needs at least one Mix-MoE layer.")
    if len(set(moe_layers)) != len(moe_layers) or not 0 <= moe_layers[0] <= moe_layers[-1] < num_layers:
        raise ValueError(f"moe_layers must be distinct indices in 0..{num_layers - 1}, got {moe_layers}.")
    if fields["group_combine"] not in GROUP_COMBINES:
        raise ValueError(f"group_combine must be one of {GROUP_COMBINES}, got {fields['group_combine']!r}.")
    if fields["base_model_type"] == "llama" and fields["use_sliding_window"]:
        raise ValueError("use_sliding_window is not supported with base_model_type 'llama'.")
    if fields["mlp_bias"]:
        raise ValueError("mlp_bias is not supported: Mix-MoE experts have no bias.")


def _rope_parameters(
    rope_parameters: dict[str, Any] | None, rope_theta: float | None, rope_scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the RoPE settings in transformers 5.x's style, from either style; absent theta is 10000."""
    settings = dict(rope_parameters or rope_scaling or {})
    settings["rope_type"] = settings.pop("type", None) or settings.get("rope_type") or "default"
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = 10000.0 if rope_theta is None else rope_theta
    return settings
