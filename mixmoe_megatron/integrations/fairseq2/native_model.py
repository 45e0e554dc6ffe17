"""The model of fairseq2's own modules; router, experts and RoPE frequencies are those of the Hugging Face model.

So a conversion renames tensors and splits the packed groups, and computes nothing.

Shape legend: B batch, S sequence, T tokens of a batch, H hidden_size, n experts of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fairseq2.gang import get_current_gangs
from fairseq2.models.transformer import (
    CausalAttentionBias,
    FeedForwardNetwork,
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    TransformerEmbeddingFrontend,
    TransformerNormOrder,
    create_default_sdpa,
)
from fairseq2.models.transformer_lm import (
    StandardTransformerLMDecoder,
    StandardTransformerLMDecoderLayer,
    TransformerLM,
)
from fairseq2.nn import ColumnShardedLinear, RMSNorm, TiedProjection, VocabShardedEmbedding
from fairseq2.nn.position_encoder import ReferenceRotaryEncoder
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.hf import MixMoEConfig
from mixmoe_megatron.hf.modeling_mixmoe import MixMoEPackedExperts, MixMoETopKRouter, llama, qwen2
from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig
from mixmoe_megatron.methods.mixmoe import GROUPS

_ROTARY = {"llama": llama.LlamaRotaryEmbedding, "qwen2": qwen2.Qwen2RotaryEmbedding}


class RoutedGroup(nn.Module):
    """The router and the experts of one group, as parameters of their own: so one group can be frozen.

    In the Hugging Face model the groups share tensors, half of which no optimizer can leave alone: AdamW's decay moves
    rows whose gradient is masked.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: MixMoEConfig) -> None:
        super().__init__()
        groups = config.stage
        one = MixMoEConfig.from_base_config(
            config.to_dict(),
            base_model_type=config.base_model_type,
            stage=1,
            num_experts=None,
            num_experts_per_tok=None,
        )
        self.router, self.experts = MixMoETopKRouter(one), MixMoEPackedExperts(one)
        if config.group_combine == "mean":
            self.router.factor /= groups
        self.init_std = config.initializer_range
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from normal(initializer_range), and set the router's bias to 0."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.init_std)
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the weighted outputs of each token's chosen experts.

        Args:
            tokens: [T, H], any floating dtype.

        Returns:
            [T, H], the dtype of the tokens.
        """
        _, weights, index = self.router(tokens)
        return self.experts(tokens, index, weights)


class MixMoEFeedForward(FeedForwardNetwork):
    """The FFN of a Mix-MoE layer: the groups `lm` and, in stage 2, `mt`.

    Source: Mix-MoE (arXiv:2605.24681) section III-A.

    Args:
        config: of the whole model.

    Attributes:
        lb_reduction: `mean` or `sum`, how the aux losses of the model's layers go together.
    """

    def __init__(self, config: MixMoEConfig) -> None:
        super().__init__()
        self.lb_reduction = config.mixmoe.get("lb_reduction", "mean")
        for name in GROUPS[: config.stage]:
            self.add_module(name, RoutedGroup(config))

    @property
    def trained_group(self) -> RoutedGroup:
        """The group that the model's stage trains: MT where there is one, else LM."""
        return list(self.groups())[-1]

    def groups(self) -> Iterator[RoutedGroup]:
        """Yield the groups, LM first."""
        yield from self.children()

    def forward(self, seqs: Tensor) -> Tensor:
        """Apply the groups and add what they give.

        Args:
            seqs: [B, S, H], or packed [T, H].

        Returns:
            The same shape and dtype.
        """
        tokens = seqs.flatten(0, -2)
        first, *others = (group(tokens) for group in self.groups())
        return sum(others, start=first).view_as(seqs)


class HuggingFaceRotaryEncoder(ReferenceRotaryEncoder):
    """RoPE by halves with the frequencies of Hugging Face, Llama 3's scaling included: no row of Q and K moves.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: MixMoEConfig) -> None:
        object.__setattr__(self, "_config", config)  # before Module.__init__, which fills the tables
        super().__init__(config.head_dim, config.max_position_embeddings)

    def reset_non_persistent_buffers(self) -> None:
        """Fill the tables [positions + 1, head_dim] float32; their first row is padding's."""
        device = self.cos_freqs.device
        if device.type == "meta":
            return
        rotary = _ROTARY[self._config.base_model_type](self._config, device=device)
        positions = torch.arange(self.max_seq_len, device=device)[None]
        cos, sin = rotary(torch.empty(1, dtype=torch.float32, device=device), positions)
        for table, values in ((self.cos_freqs, cos), (self.sin_freqs, sin)):
            table[0] = 0.0
            table[1:] = values[0]


def create_mixmoe_model(config: MixMoEModelConfig) -> TransformerLM:
    """Return a new model on torch's default device, in its default dtype; the routers are float32 whatever that is.

    Args:
        config: of the family.

    Raises:
        MixMoEError: the configuration is none that this family runs, or tensor parallelism meets tied embeddings.
    """
    hf = config.to_hf()
    if hf.tie_word_embeddings and get_current_gangs().tp.size > 1:
        raise MixMoEError(
            "fairseq2 cannot split tied embeddings: take gang.tensor_parallel_size 1, or a model with "
            "tie_word_embeddings false."
        )

    def init(module: Any) -> None:
        nn.init.normal_(module.weight, std=hf.initializer_range)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    # fairseq2 takes targets that are padding out of the loss, whatever a mask says: an EOS that pads must stay in.
    eos = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    pad = None if hf.pad_token_id in eos else hf.pad_token_id
    embed = VocabShardedEmbedding(hf.vocab_size, hf.hidden_size, pad, init_fn=init)
    rotary = HuggingFaceRotaryEncoder(hf)
    layers = [_decoder_layer(hf, index, rotary, init) for index in range(hf.num_hidden_layers)]
    if hf.tie_word_embeddings:
        output: Any = TiedProjection(embed.weight, bias=None)
    else:
        output = ColumnShardedLinear(hf.hidden_size, hf.vocab_size, bias=False, init_fn=init)
    frontend = TransformerEmbeddingFrontend(hf.hidden_size, embed, pos_encoder=None, no_scale=True)
    decoder = StandardTransformerLMDecoder(layers, _norm(hf))
    return TransformerLM(hf.hidden_size, frontend, decoder, output, pad, hf.max_position_embeddings)


def _norm(hf: MixMoEConfig) -> RMSNorm:
    return RMSNorm(hf.hidden_size, bias=False, eps=hf.rms_norm_eps)


def _decoder_layer(
    hf: MixMoEConfig, index: int, rotary: HuggingFaceRotaryEncoder, init: Any
) -> StandardTransformerLMDecoderLayer:
    """Return a layer: attention, and the experts or a dense FFN."""
    attention = StandardMultiheadAttention(
        hf.hidden_size,
        hf.num_attention_heads,
        create_default_sdpa(CausalAttentionBias()),
        head_dim=hf.head_dim,
        num_key_value_heads=hf.num_key_value_heads,
        bias=hf.base_model_type == "qwen2" or hf.attention_bias,
        output_proj_bias=hf.base_model_type == "llama" and hf.attention_bias,
        pos_encoder=rotary,
        qkv_proj_init_fn=init,
        output_proj_init_fn=init,
    )
    if index in hf.moe_layers:
        ffn: FeedForwardNetwork = MixMoEFeedForward(hf)
    else:
        ffn = GLUFeedForwardNetwork(
            hf.hidden_size,
            hf.intermediate_size,
            bias=False,
            gate_activation=ACT2FN[hf.hidden_act],
            inner_dim_scale=1.0,
            proj_init_fn=init,
        )
    return StandardTransformerLMDecoderLayer(attention, _norm(hf), ffn, _norm(hf), norm_order=TransformerNormOrder.PRE)
