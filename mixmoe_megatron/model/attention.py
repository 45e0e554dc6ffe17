"""Attention core and RMSNorm in plain torch, for Megatron's local (not Transformer Engine) modules.

Megatron's own local attention materialises the [B, heads, S, S] scores; its torch norm refuses sequence parallelism.

Under context parallelism the keys and values of the whole sequence are gathered (their gradients scattered back): plain
and exact. Transformer Engine has the algorithms that overlap this with the attention itself.

Packed documents attend one after the other: on a CPU 3 to 13 times as fast as one call with a block-diagonal mask.

Shape legend: S sequence (its local part under context parallelism), B batch, A query heads and K key-value heads on
this rank (K divides A), D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from mixmoe_megatron.errors import MixMoEError


class TorchCoreAttention(MegatronModule):
    """Softmax attention by `F.scaled_dot_product_attention`, with grouped query heads.

    Args:
        config: the Transformer configuration.
        layer_number: 1-based.
        attn_mask_type: causal (no mask tensor is looked at), or another type with a mask tensor.
        attention_type: "self" or "cross"; unused.
        attention_dropout: None: the config's.
        softmax_scale: None: 1 / sqrt(D).
        pg_collection: Megatron's process groups (cp).
        kwargs: arguments of Megatron's other attentions, unused: keys and values are gathered whatever cp_comm_type is.

    Raises:
        MixMoEError: a sliding window or a softmax variant, which need Transformer Engine, or query-key layer scaling.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ):
        super().__init__(config=config)
        if config.window_size is not None:
            raise MixMoEError("sliding-window attention needs Transformer Engine.")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise MixMoEError(f"softmax_type={config.softmax_type} needs Transformer Engine.")
        self.attn_mask_type = attn_mask_type
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        if config.apply_query_key_layer_scaling:
            # Megatron divides by the layer number and multiplies back after the mask: no change in exact maths.
            raise MixMoEError("apply_query_key_layer_scaling is not supported by the torch attention.")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, A, D]. key, value: [S', B, K, D]; params_dtype. Packed: [S, A, D] and [S, K, D].
            attention_mask: bool, broadcastable to [B, A, S, S'], True = masked; not looked at if the type is causal.
            attn_mask_type: None: the one given at construction.
            attention_bias: must be None.
            packed_seq_params: where the documents of a packed row begin (qkv_format "thd"); each attends to itself.

        Returns:
            [S, B, A * D], the dtype of the query.

        Raises:
            MixMoEError: attention_bias is given, or the case needs Transformer Engine.
        """
        if attention_bias is not None:
            raise MixMoEError("attention bias needs Transformer Engine.")
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params)
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        # One query token attends to all keys (decoding with a cache); torch would align a causal mask to the first.
        causal = mask_type == AttnMaskType.causal and query.shape[0] > 1
        if causal and query.shape[0] != key.shape[0]:
            raise MixMoEError("causal attention of several queries over a longer cache needs Transformer Engine.")
        ignores_mask = attention_mask is None or mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
        allowed = None if ignores_mask else ~attention_mask  # type: ignore[operator]
        if utils.get_pg_size(self.cp_group) > 1:
            if not causal:
                raise MixMoEError("context parallelism is for causal attention over the whole sequence.")
            key, value, allowed = self._gather(key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and allowed is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """Attend within each document: [S, A, D], [S, K, D], [S, K, D] -> [S, 1, A * D]."""
        if utils.get_pg_size(self.cp_group) > 1 or self.attn_mask_type == AttnMaskType.no_mask:
            raise MixMoEError("packed documents are for causal attention without context parallelism.")
        lengths = packed.cu_seqlens_q.diff().tolist()
        documents = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self(*document, None, AttnMaskType.causal) for document in documents])

    def _gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return all ranks' keys and values, and which of them each query of this rank sees: [S, S * ranks] bool.

        Megatron cuts a sequence into 2 * ranks chunks; rank r holds chunks r and 2 * ranks - 1 - r.
        """
        ranks, rank = utils.get_pg_size(self.cp_group), utils.get_pg_rank(self.cp_group)
        chunks = torch.arange(len(key) * ranks, device=key.device).view(2 * ranks, -1)
        positions = torch.stack([chunks[:ranks], chunks[ranks:].flip(0)], dim=1).view(ranks, -1)
        key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        return key, value, positions[rank].unsqueeze(1) >= positions.flatten()


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for sequence parallelism; built as Megatron's norms are.

    Args:
        config: the Transformer configuration.
        hidden_size: width of the last axis.
        eps: added to the mean square.
        kwargs: arguments of Megatron's other norms, unused.

    Raises:
        MixMoEError: the config asks for another norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise MixMoEError("the local modules support --normalization RMSNorm without zero-centred gamma only.")
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
