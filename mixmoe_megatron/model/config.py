"""Megatron's TransformerConfig with the Mix-MoE options, and which of its settings go with Mix-MoE.

A stage is 0 (dense, no experts), 1 (LM experts) or 2 (LM and MT experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.options import OPTION_NAMES, MixMoEOptions, mixmoe_megatron_args

#: Values of `experts_backend`, see `backends.choose_experts_backend`.
EXPERTS_BACKENDS: tuple[str, ...] = ("auto", "torch", "te", "sequential")


@dataclass
class MixMoETransformerConfig(MixMoEOptions, TransformerConfig):
    """Megatron's TransformerConfig with the Mix-MoE options as flat fields.

    `core_transformer_config_from_args(args, config_class=MixMoETransformerConfig)` fills it from an args namespace
    that carries the options under their names and `mixmoe_megatron_args`' values.

    Args:
        mixmoe_stage: 0 (dense), 1 (LM group) or 2 (LM and MT groups).
        experts_backend: "auto", "te" (Transformer Engine), "torch" (torch's grouped GEMM) or "sequential".
        new_layers: 0-based numbers of the layers that the base has not (LLaMA-Pro).
        lora_rank: r of the low-rank matrices beside the linear layers; 0: there are none.
        lora_alpha: their output is multiplied by lora_alpha / lora_rank.
        lpr_coeff: weight of the loss that asks the router for the base expert (MoE-LPR); 0: there is none.
        lpr_impl: "paper" is -log p of that expert; "released" takes the softmax of p once more, as the released code.
        seed: of the routers' first weights; Megatron's --seed.

    Raises:
        MixMoEError: an option, or a Megatron setting that does not go with Mix-MoE; one sentence says which.
    """

    mixmoe_stage: int = 1
    experts_backend: str = "auto"
    new_layers: tuple[int, ...] = ()
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lpr_coeff: float = 0.0
    lpr_impl: str = "paper"
    seed: int = 1234

    def __post_init__(self) -> None:
        MixMoEOptions.validate(self)
        phase_of_stage(self.mixmoe_stage)  # refuses an unknown one
        if self.new_layers or self.lora_rank:  # trained and frozen layers cannot share the optimizer's stacked tensors
            self.hetereogenous_dist_checkpoint = True
        if self.lora_rank:
            _check_lora(self)
        if self.mixmoe_stage == 0:
            if self.num_moe_experts is not None:
                raise MixMoEError("mixmoe_stage=0 is the dense model: num_moe_experts must be left out.")
        else:
            # Stock Megatron would ask for this flag (selective recompute of `moe_act`); our experts are always grouped.
            self.moe_grouped_gemm = True
            check_transformer_config(self)
        TransformerConfig.__post_init__(self)

    @classmethod
    def build(
        cls, options: MixMoEOptions, stage: int, *, num_layers: int, ffn_hidden_size: int, **kwargs: Any
    ) -> MixMoETransformerConfig:
        """Return the config of `options` and `stage`; `kwargs` are the other TransformerConfig fields.

        Raises:
            MixMoEError: as the class.
        """
        derived = _derived_fields(options, stage, num_layers, ffn_hidden_size)
        sizes = {"num_layers": num_layers, "ffn_hidden_size": ffn_hidden_size, "mixmoe_stage": stage}
        return cls(**{**options.to_dict(), **derived, **sizes, **kwargs})

    def options(self) -> MixMoEOptions:
        """Return the Mix-MoE options alone."""
        return options_and_stage(self)[0]


def _check_lora(config: MixMoETransformerConfig) -> None:
    tensor_parallel = config.tensor_model_parallel_size
    if tensor_parallel > 1 and not config.sequence_parallel:
        raise MixMoEError("LoRA under --tensor-model-parallel-size > 1 needs --sequence-parallel.")
    groups = config.num_query_groups or config.num_attention_heads
    if groups % tensor_parallel:
        raise MixMoEError(
            f"LoRA under tensor parallelism needs as many key and value heads on each rank: {groups} are not divisible "
            f"by tensor_model_parallel_size={tensor_parallel}."
        )


def _check_lpr(config: MixMoETransformerConfig) -> None:
    if not 0 <= config.lpr_coeff < float("inf"):
        raise MixMoEError(f"lpr_coeff must be finite and not negative, got {config.lpr_coeff!r}.")
    if config.lpr_impl not in ("paper", "released"):
        raise MixMoEError(f"lpr_impl must be paper or released, got {config.lpr_impl!r}.")
    if config.lpr_coeff and not config.base_expert:
        raise MixMoEError("lpr_coeff needs a model with a base expert: convert one with --method moe_lpr.")
    if config.lpr_coeff and config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or []):
        raise MixMoEError(
            "lpr_coeff does not go with --recompute-modules moe, which forgets the tokens' languages: take "
            "--recompute-granularity full, or another module."
        )


def _derived_fields(options: MixMoEOptions, stage: int, num_layers: int, ffn_hidden_size: int) -> dict[str, Any]:
    """Return the fields of a config that follow from the options; one is named otherwise than Megatron's argument."""
    fields = mixmoe_megatron_args(options, stage, num_layers, ffn_hidden_size)
    fields["num_moe_experts"] = fields.pop("num_experts")
    return fields


def options_and_stage(config: TransformerConfig) -> tuple[MixMoEOptions, int]:
    """Return the Mix-MoE options and the stage (1 or 2) that a module's config carries.

    Raises:
        MixMoEError: it carries none.
    """
    if not hasattr(config, "mixmoe_stage"):
        raise MixMoEError(
            "a plain TransformerConfig has no Mix-MoE options: build a MixMoETransformerConfig, or start stock "
            "pretrain_gpt.py with --spec mixmoe_megatron.integrations.stock_megatron stage1 (or stage2)."
        )
    return MixMoEOptions.from_dict({name: getattr(config, name) for name in OPTION_NAMES}), config.mixmoe_stage


#: Megatron setting -> values that go with Mix-MoE, and why the others do not
Requirements = dict[str, tuple[tuple[Any, ...], str]]

_OWN_EXPERTS = "it is a setting of Megatron's own experts"
_BASE = "the base is of the Llama or Qwen2 family"
_REQUIRED_SETTINGS: Requirements = {
    "moe_router_fusion": ((False,), "the fused router knows no expert groups"),
    "moe_router_num_groups": ((None,), "Mix-MoE has its own expert groups"),
    "moe_router_group_topk": ((None,), "Mix-MoE has its own expert groups"),
    "moe_router_topk_limited_devices": ((None,), "Mix-MoE has its own expert groups"),
    "moe_router_enable_expert_bias": ((False,), "balance is kept by the aux loss of each group"),
    "moe_router_topk_scaling_factor": ((None, 1.0), "use the option expert_scale"),
    "moe_router_score_function": (("softmax",), "eq. 6-7 of the paper are a softmax in each group"),
    "moe_router_load_balancing_type": (("aux_loss", "none", ["aux_loss"]), "Mix-MoE has one aux loss per group"),
    "moe_router_quantile_balancing_ema": ((0.0,), "balance is kept by the aux loss of each group"),
    "moe_router_dtype": ((None, "fp32"), "the routers compute in float32"),
    "moe_router_padding_for_quantization": ((False, None), "each token goes to exactly topk_per_group experts"),
    "moe_router_padding_for_fp8": ((False, None), "each token goes to exactly topk_per_group experts"),
    "moe_router_force_load_balancing": ((False,), "it would overrule the routers"),
    "moe_router_force_biased": ((None,), "it would overrule the routers"),
    "moe_enable_routing_replay": ((False,), "the routers do not record their choices"),
    "moe_expert_capacity_factor": ((None,), "Mix-MoE drops no token"),
    "moe_expert_rank_capacity_factor": ((None,), "Mix-MoE drops no token"),
    "moe_pad_expert_input_to_capacity": ((False,), "Mix-MoE drops no token"),
    "moe_token_dropping": ((False,), "Mix-MoE drops no token"),
    "moe_input_jitter_eps": ((None,), "the routers take no noise"),
    "moe_z_loss_coeff": ((None,), "the paper has no z-loss"),
    "moe_shared_expert_gate": ((False,), "a shared expert has the weight 1"),
    "moe_shared_expert_overlap": ((False,), "a shared expert runs before the others, in the same stream"),
    "use_grouped_gemm_for_shared_expert": ((False,), "a shared expert is computed as a dense FFN is"),
    "moe_latent_size": ((None,), "experts work on the full hidden size"),
    "moe_apply_probs_on_input": ((False,), "probabilities scale the experts' outputs"),
    "moe_router_pre_softmax": ((True,), "the softmax comes before the top-k (--moe-router-pre-softmax)"),
    "add_bias_linear": ((False,), "experts have no bias (--disable-bias-linear)"),
    "gated_linear_unit": ((True,), "experts are gated, as the FFN they are cut from (--swiglu)"),
    "activation_func": ((functional.silu,), _BASE),
    "glu_linear_offset": ((0.0,), "experts compute what the FFN did that they are cut from"),
    "activation_func_clamp_value": ((None,), "experts compute what the FFN did that they are cut from"),
    "moe_mlp_glu_interleave_size": ((None,), "experts keep gate and up projection apart"),
    "moe_single_grouped_weight": ((False,), _OWN_EXPERTS),
    "moe_paged_stash": ((False,), _OWN_EXPERTS),
    "overlap_moe_expert_parallel_comm": ((False,), "its schedule runs layers in pieces, past what freezes them"),
    "overlap_dispatch_backward_with_experts_wgrad": ((False,), "Megatron-FSDP alone adds its delayed gradients up"),
    "cuda_graph_impl": (("none",), "the frozen layers run ahead of what a graph would capture"),
    "mtp_num_layers": ((None, 0), "multi-token prediction is not part of Mix-MoE"),
    "experimental_attention_variant": ((None,), _BASE),
    "is_hybrid_model": ((False,), _BASE),
    "heterogeneous_block_specs": ((False,), _BASE),
    "use_mup": ((False,), "the weights come from a pretrained model"),
}


def check_settings(settings: Any, requirements: Requirements) -> None:
    """Check attributes of a config or of an args namespace; those that it lacks are taken as supported.

    Raises:
        MixMoEError: one has a value that is not supported.
    """
    for name, (allowed, why) in requirements.items():
        value = getattr(settings, name, allowed[0])
        if value not in allowed:
            raise MixMoEError(f"{name}={value!r} does not go with Mix-MoE: {why}.")


def check_expert_parallel(num_experts_per_group: int, expert_model_parallel_size: int) -> None:
    """Check that every expert-parallel rank gets the same number of experts of each group.

    Raises:
        MixMoEError: the number of experts is not divisible by the number of ranks.
    """
    if num_experts_per_group % expert_model_parallel_size:
        raise MixMoEError(
            f"num_experts_per_group={num_experts_per_group} is not divisible by "
            f"expert_model_parallel_size={expert_model_parallel_size}: "
            "every expert-parallel rank holds the same number of LM and of MT experts."
        )


def check_transformer_config(config: MixMoETransformerConfig) -> None:
    """Check the config of an MoE stage (1 or 2) against its own Mix-MoE options.

    Raises:
        MixMoEError: a setting contradicts the options or is not supported; one sentence says which.
    """
    check_settings(config, _REQUIRED_SETTINGS)
    if isinstance(config.moe_aux_loss_coeff, list) and len(config.moe_aux_loss_coeff) != 1:
        raise MixMoEError("moe_aux_loss_coeff must be one number: both groups share it.")
    if config.experts_backend not in EXPERTS_BACKENDS:
        backends = ", ".join(EXPERTS_BACKENDS)
        raise MixMoEError(f"experts_backend must be one of {backends}, got {config.experts_backend!r}.")
    _check_lpr(config)
    check_expert_parallel(config.num_experts_per_group, config.expert_model_parallel_size)
    etp = config.expert_tensor_parallel_size or 1
    if config.moe_ffn_hidden_size and config.moe_ffn_hidden_size % etp:
        raise MixMoEError(
            f"moe_ffn_hidden_size={config.moe_ffn_hidden_size} is not divisible by expert_tensor_parallel_size={etp}."
        )
    ffn_hidden_size = config.ffn_hidden_size or 4 * config.hidden_size
    derived = _derived_fields(*options_and_stage(config), config.num_layers, ffn_hidden_size)
    shared, tensor_parallel = derived["moe_shared_expert_intermediate_size"] or 0, config.tensor_model_parallel_size
    if shared % tensor_parallel:
        raise MixMoEError(
            f"the shared expert's width {shared} is not divisible by tensor_model_parallel_size={tensor_parallel}."
        )
    for name in ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq",
                 "moe_shared_expert_intermediate_size"):  # fmt: skip
        if (value := getattr(config, name)) != derived[name]:
            raise MixMoEError(f"{name}={value!r} contradicts the Mix-MoE options, which give {derived[name]!r}.")
