"""Mix-MoE in plain PyTorch and transformers: the reference the Megatron layer is tested against.

This file is copied into every exported checkpoint (`trust_remote_code=True`), so it imports torch, transformers (4.57
or 5.x) and `configuration_mixmoe` only. Attention, norms, RoPE, caches and masks are transformers' own Llama or Qwen2;
only the FFN of the layers in `config.moe_layers` is replaced.

Shape legend: B batch, S sequence, T = B * S tokens, H hidden_size, F moe_intermediate_size, G expert groups (= stage),
n experts per group, E = G * n experts (LM first, then MT), k experts chosen per group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.utils import can_return_tuple

from .configuration_mixmoe import MixMoEConfig

try:  # transformers 5.x: `experts_implementation`, tensor and expert parallelism
    from transformers.integrations import use_experts_implementation  # type: ignore[attr-defined]
    from transformers.utils.output_capturing import OutputRecorder

    _LM_HEAD_TP_STYLE = "colwise_gather_output"
except ImportError:  # transformers 4.57
    from transformers.utils.generic import OutputRecorder

    _LM_HEAD_TP_STYLE = "colwise_rep"

    def use_experts_implementation(experts_class: type[nn.Module]) -> type[nn.Module]:
        """Return the class as it is: transformers 4.57 has no choice of expert implementations."""
        return experts_class


_grouped_mm: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class MixMoETopKRouter(nn.Module):
    """Route each token to its top-k experts in each group. All maths in float32.

    Source: Mix-MoE (arXiv:2605.24681) eq. 3-7. The spectral features are folded into `weight`: Re FFT is linear, so
    W_h h + W_f Re FFT(h) is one linear layer of h, exactly.
    """

    def __init__(self, config: MixMoEConfig):
        super().__init__()
        self.num_groups = config.stage
        self.top_k = config.topk_per_group
        self.prob_scaling, self.renormalize = config.router_prob_scaling, config.renormalize_topk
        self.factor = 1.0 / self.num_groups if config.group_combine == "mean" else 1.0
        self.factor *= config.expert_scale if self.prob_scaling else 1.0
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(config.num_experts, dtype=torch.float32)) if config.router_bias else None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute logits, softmax within each group, top-k within each group.

        Args:
            hidden_states: [T, H], any floating dtype.

        Returns:
            logits: [T, E] float32. top_k_weights: [T, G*k] float32, what each chosen expert's output is multiplied by
            (with the group combine folded in). top_k_index: [T, G*k] int64, expert ids in 0..E-1.
        """
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = functional.linear(hidden_states.float(), self.weight.float(), bias)
        groups = logits.unflatten(-1, (self.num_groups, -1))
        chosen = groups.topk(self.top_k, dim=-1).indices  # not of probabilities: several underflow to the same 0
        probs = groups.gather(-1, chosen).softmax(-1) if self.renormalize else groups.softmax(-1).gather(-1, chosen)
        weights = self.factor * (probs if self.prob_scaling else torch.ones_like(probs))
        first_expert = torch.arange(self.num_groups, device=logits.device)[:, None] * groups.shape[-1]
        return logits, weights.flatten(-2), (chosen + first_expert).flatten(-2)


@use_experts_implementation
class MixMoEPackedExperts(nn.Module):
    """All experts of a layer, packed: LM experts 0..n-1, then MT experts n..2n-1.

    Source: Mix-MoE (arXiv:2605.24681) eq. 1-2. Each expert is down(SiLU(gate(h)) * up(h)), with the base's activation.
    """

    def __init__(self, config: MixMoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))  # gate rows, then up rows
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum the weighted outputs of each token's chosen experts, accumulated in the dtype of the weights.

        Args:
            hidden_states: [T, H], the dtype of the experts.
            top_k_index: [T, K] int64. Ids outside 0..num_experts-1 (experts of another rank) contribute nothing.
            top_k_weights: [T, K] float32.

        Returns:
            [T, H], the dtype of hidden_states.
        """
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype
        gate_up_proj, down_proj = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        use_grouped_mm = _can_use_grouped_mm(gate_up_proj, down_proj)
        if torch.compiler.is_compiling() and not use_grouped_mm:
            return self._dense_forward(hidden_states, top_k_index, top_k_weights)
        flat_index = top_k_index.flatten()
        order = flat_index.argsort(stable=True)  # (token, slot) pairs sorted by expert
        ends: Any = torch.searchsorted(
            flat_index[order], torch.arange(self.num_experts, device=order.device), right=True
        )
        if not use_grouped_mm:
            ends = ends.tolist()
            order = order[: ends[-1]]
        token = order // top_k_index.shape[-1]
        gate, up = _grouped_linear(hidden_states[token].to(dtype), gate_up_proj, ends).chunk(2, dim=-1)
        weighted = _grouped_linear(self.act_fn(gate) * up, down_proj, ends) * top_k_weights.flatten()[order, None]
        return weighted.new_zeros(hidden_states.shape).index_add(0, token, weighted).to(hidden_states.dtype)

    def _dense_forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute every expert for every token: no shape depends on the data. A group costs what the dense FFN does."""
        num_tokens, ids = top_k_index.shape[0], top_k_index.clamp(max=self.num_experts)
        weights = top_k_weights.new_zeros(num_tokens, self.num_experts + 1).scatter_add(1, ids, top_k_weights)
        weights = weights[:, :-1].T.unsqueeze(-1)  # [E, T, 1], 0 off the chosen experts
        gate, up = (hidden_states @ self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        expert_output = (self.act_fn(gate) * up) @ self.down_proj.transpose(1, 2)
        return torch.where(weights == 0, 0.0, weights * expert_output).sum(dim=0).to(hidden_states.dtype)


def _grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor | list[int]) -> torch.Tensor:
    """Multiply each expert's rows by its weight: with one grouped GEMM, or with a GEMM for each expert that has rows.

    rows: [R, in], sorted by expert. weight: [E, out, in]. ends: where each expert's rows end: [E] int64 for the grouped
    GEMM, else E integers, the last one R. Returns [R, out], zero beyond the last end.
    """
    if isinstance(ends, list):
        every = torch.is_grad_enabled() or not len(rows)  # in training no expert lacks a gradient
        pairs = zip(rows.tensor_split(ends[:-1]), weight, strict=True)
        return torch.cat([functional.linear(*pair) for pair in pairs if every or len(pair[0])])
    is_here = (torch.arange(len(rows), device=rows.device) < ends[-1])[:, None]
    return _grouped_mm(rows.where(is_here, 0.0), weight.transpose(1, 2), offs=ends.int()).where(is_here, 0.0)


def _can_use_grouped_mm(*tensors: torch.Tensor) -> bool:
    """Tell whether torch's grouped GEMM takes these tensors: bfloat16, compute capability 9 (H100), rows of 16 bytes.

    Below, no graph captures it; above, experts without tokens get wrong gradients (pytorch issue 172439).
    """
    return (
        _grouped_mm is not None
        and all(t.is_cuda and t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 for t in tensors)
        and torch.cuda.get_device_capability(tensors[0].device)[0] == 9
    )


class MixMoEBlock(nn.Module):
    """The FFN of a Mix-MoE layer: y = s * p * E(h) of the LM group; in stage 2 its mean or sum with the MT group's.

    Source: Mix-MoE (arXiv:2605.24681) section III-A; the scale s and the mean are additions, D1 and D2 of
    mixmoe_megatron/model/README.md.
    """

    def __init__(self, config: MixMoEConfig):
        super().__init__()
        self.router = MixMoETopKRouter(config)
        self.experts = MixMoEPackedExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply router and experts to [B, S, H] after the post-attention RMSNorm; the same shape and dtype come out."""
        tokens = hidden_states.flatten(0, -2)
        _, top_k_weights, top_k_index = self.router(tokens)
        return self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)


def router_aux_loss(
    router_logits: tuple[torch.Tensor, ...], num_groups: int, top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the load-balancing aux loss of each expert group, n * sum_i f_i P_i, averaged over the layers.

    f_i is the share of the routed (token, slot) pairs that went to expert i, P_i its mean probability: 1 when balanced.

    Source: Mix-MoE (arXiv:2605.24681) eq. 8-9.

    Args:
        router_logits: one [T, E] float tensor per MoE layer.
        num_groups: G.
        top_k: k.
        attention_mask: [B, S] with B * S = T, 0 on padding, which is left out. None: all tokens count.

    Returns:
        [G] float32.
    """
    logits = torch.stack([x.float().to(router_logits[0].device) for x in router_logits]).unflatten(-1, (num_groups, -1))
    probs = logits.softmax(dim=-1)  # [layers, T, G, n]
    routed = functional.one_hot(logits.topk(top_k, dim=-1).indices, probs.shape[-1]).sum(dim=-2).to(probs.dtype)
    counts = torch.ones_like(probs[0, :, 0, 0]) if attention_mask is None else attention_mask.flatten().to(probs)
    num_tokens = counts.sum().clamp(min=1)
    token_share = torch.einsum("t,ltgn->lgn", counts, routed) / (num_tokens * top_k)
    mean_prob = torch.einsum("t,ltgn->lgn", counts, probs) / num_tokens
    return probs.shape[-1] * (token_share * mean_prob).sum(dim=-1).mean(dim=0)


_FAMILIES = {"llama": (llama, "Llama"), "qwen2": (qwen2, "Qwen2")}


def _family_class(base_model_type: str, kind: str) -> type[nn.Module]:
    """Return a class of the dense family, for example the "DecoderLayer" of "qwen2"."""
    module, prefix = _FAMILIES[base_model_type]
    return getattr(module, prefix + kind)


class MixMoEPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every Mix-MoE model: initialisation, loading, recording, parallelism."""

    config_class = MixMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: Any = [f"{prefix}DecoderLayer" for _, prefix in _FAMILIES.values()]
    _skip_keys_device_placement: Any = ["past_key_values"]
    _keep_in_fp32_modules_strict: Any = ["router"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: Any = {
        "router_logits": OutputRecorder(MixMoETopKRouter, index=0),
        "hidden_states": [llama.LlamaDecoderLayer, qwen2.Qwen2DecoderLayer],
        "attentions": "self_attn",  # by module name: 4.57 takes a list of two classes for self and cross attention
    }

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module: experts and router weights normal(initializer_range), router bias 0."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MixMoETopKRouter):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, MixMoEPackedExperts):
            nn.init.normal_(module.gate_up_proj, mean=0.0, std=std)
            nn.init.normal_(module.down_proj, mean=0.0, std=std)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turn on gradient checkpointing, non-reentrant by default: the reentrant kind would drop the aux loss."""
        super().gradient_checkpointing_enable(
            {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}, **kwargs
        )


class MixMoEModel(MixMoEPreTrainedModel):
    """The decoder without the language-model head: Llama or Qwen2 with Mix-MoE blocks in `config.moe_layers`."""

    def __init__(self, config: MixMoEConfig):
        super().__init__(config)
        family = config.base_model_type
        decoder_layer = _family_class(family, "DecoderLayer")
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(decoder_layer(config, index) for index in range(config.num_hidden_layers))
        for index in config.moe_layers:
            self.layers[index].mlp = MixMoEBlock(config)
        self.norm = _family_class(family, "RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = _family_class(family, "RotaryEmbedding")(config=config)
        self.has_sliding_layers = "sliding_attention" in getattr(config, "layer_types", ())
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the forward of the base family's model, which does masks, RoPE, cache and recording of outputs.

        Args:
            input_ids: [B, S] int64, or None with `inputs_embeds`.
            attention_mask: [B, S], 0 on padding, or None.
            kwargs: as in LlamaModel.forward, and `output_router_logits`.

        Returns:
            The base family's output; with `output_router_logits`, `router_logits` holds a [T, E] tensor per MoE layer.
        """
        base_forward = _family_class(self.config.base_model_type, "Model").forward
        return base_forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class MixMoEForCausalLM(MixMoEPreTrainedModel, GenerationMixin):  # type: ignore[misc]  # as every HF model
    """Mix-MoE with the language-model head."""

    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: Any = {"lm_head": _LM_HEAD_TP_STYLE}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}
    _auto_class = "AutoModelForCausalLM"  # save_pretrained ships this file

    def __init__(self, config: MixMoEConfig):
        super().__init__(config)
        self.model = MixMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Compute next-token logits and, with labels, the loss.

        Args:
            input_ids: [B, S] int64, or None with `inputs_embeds`.
            attention_mask: [B, S], 0 on padding, or None.
            position_ids: [B, S] int64, or None.
            labels: [B, S] int64, -100 where there is no loss; shifted inside.
            logits_to_keep: compute the logits of the last so many positions (0: all), or of these positions.
            output_router_logits: return `router_logits`, one [T, E] float32 tensor per MoE layer, and, with labels,
                `aux_loss`, the sum over groups of `router_aux_loss`. None: as the config says.
            kwargs: `past_key_values`, `use_cache`, `inputs_embeds` ..., as in LlamaForCausalLM.forward.
                `num_items_in_batch`, as Trainer gives it: target tokens of the whole batch, of which this is a part.

        Returns:
            The usual output. The loss is the cross-entropy, in training mode plus mixmoe_aux_loss_coef * aux_loss.

        Raises:
            ValueError: the aux loss is wanted with an attention_mask that is not [B, S], or under reentrant gradient
                checkpointing, which would drop its gradient.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        coefficient = self.config.mixmoe_aux_loss_coef if self.training else 0.0
        wants_aux_loss = labels is not None and (output_router_logits or coefficient != 0.0)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_router_logits=output_router_logits or wants_aux_loss,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        loss: Any = None
        aux_loss: Any = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if wants_aux_loss:
            aux_loss = self._aux_loss(outputs.router_logits, attention_mask, hidden_states.shape[1]).to(loss.device)
            loss = loss + coefficient * _batch_share(labels, kwargs.get("num_items_in_batch")) * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _aux_loss(
        self, router_logits: tuple[torch.Tensor, ...], attention_mask: Any, sequence_length: int
    ) -> torch.Tensor:
        """Return the aux loss summed over the groups (a float32 scalar), padding left out."""
        if attention_mask is not None:
            if not torch.is_tensor(attention_mask) or attention_mask.dim() != 2:
                raise ValueError("The aux loss needs an attention_mask of shape [batch, sequence].")
            attention_mask = attention_mask[:, -sequence_length:]
        router = self.model.layers[self.config.moe_layers[0]].mlp.router
        if torch.is_grad_enabled() and router.weight.requires_grad and not router_logits[0].requires_grad:
            raise ValueError("Reentrant gradient checkpointing drops the aux loss: use use_reentrant=False.")
        return router_aux_loss(router_logits, router.num_groups, router.top_k, attention_mask).sum()


def _batch_share(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """Return the share of this call in the batch's loss: 1, or under gradient accumulation its share of the targets."""
    return 1.0 if num_items_in_batch is None else (labels[..., 1:] != -100).sum() / num_items_in_batch


__all__ = ["MixMoEForCausalLM", "MixMoEModel", "MixMoEPreTrainedModel", "router_aux_loss"]
