"""The parameters of a rank under a parallel layout, and their counts: plain arithmetic, without Megatron."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.layouts import ParallelLayout


@dataclass(frozen=True)
class LocalParameter:
    """A parameter on one rank.

    Attributes:
        name: in the GPTModel of this package's specs, with Megatron's local modules.
        shape: this rank's part.
        is_expert: belongs to Megatron's expert process groups.
        is_shared_embedding: one of the two copies of a tied embedding, which lie on the first and last pipeline stage.
    """

    name: str
    shape: tuple[int, ...]
    is_expert: bool = False
    is_shared_embedding: bool = False


def rank_parameters(sizes: Sizes, layout: ParallelLayout, pp_rank: int, ep_rank: int = 0) -> Iterator[LocalParameter]:
    """Yield the parameters of a rank of one pipeline stage, in the order of the model's `named_parameters`.

    All ranks of a stage hold parameters of the same shapes; which part of a tensor and which experts differs. A base
    expert lies on the first of the expert-parallel ranks alone, which holds one less of the others.

    Args:
        sizes: of the model, vocabulary padded for the layout (`ModelDescription.sizes_under(layout.tp)`).
        layout: the parallel sizes.
        pp_rank: the pipeline stage.
        ep_rank: place among those that share out the experts.
    """
    tp, hidden, vocab = layout.tp, sizes.hidden_size, (sizes.padded_vocab_size // layout.tp, sizes.hidden_size)
    last, shared = pp_rank == layout.pp - 1, sizes.tied and layout.pp > 1
    if pp_rank == 0:
        yield LocalParameter("embedding.word_embeddings.weight", vocab, is_shared_embedding=shared)
    query, key_value = (
        count * sizes.kv_channels // tp for count in (sizes.num_attention_heads, 2 * sizes.num_query_groups)
    )
    for layer in layout.layers(sizes.num_layers, pp_rank):
        name = f"decoder.layers.{layer}."
        yield LocalParameter(name + "input_layernorm.weight", (hidden,))
        yield LocalParameter(name + "self_attention.linear_proj.weight", (hidden, query))
        yield from _adapters(name + "self_attention.linear_proj", sizes, query, {"o": hidden})
        yield LocalParameter(name + "self_attention.linear_qkv.weight", (query + key_value, hidden))
        if sizes.qkv_bias:
            yield LocalParameter(name + "self_attention.linear_qkv.bias", (query + key_value,))
        parts = {"q": query, "k": key_value // 2, "v": key_value // 2}
        yield from _adapters(name + "self_attention.linear_qkv", sizes, hidden, parts)
        yield LocalParameter(name + "pre_mlp_layernorm.weight", (hidden,))
        if layer in sizes.moe_layers:
            yield from _moe_parameters(sizes, layout, name + "mlp.", ep_rank)
        else:
            width = sizes.ffn_hidden_size // tp
            yield LocalParameter(name + "mlp.linear_fc1.weight", (2 * width, hidden))
            yield from _adapters(name + "mlp.linear_fc1", sizes, hidden, {"gate": width, "up": width})
            yield LocalParameter(name + "mlp.linear_fc2.weight", (hidden, width))
            yield from _adapters(name + "mlp.linear_fc2", sizes, width, {"down": hidden})
    if last:
        yield LocalParameter("decoder.final_layernorm.weight", (hidden,))
    if last and (not sizes.tied or shared):
        yield LocalParameter("output_layer.weight", vocab, is_shared_embedding=shared)


class ParameterCounts(NamedTuple):
    """Parameters of a model: all, of them those that a token meets (of n experts it meets k), those that train."""

    total: int
    active: int
    trained: int


def count_parameters(model: ModelDescription) -> ParameterCounts:
    """Count the parameters of a whole model.

    Args:
        model: the model.
    """
    sizes = model.sizes_under(1)
    total, active, trained = 0, 0.0, 0
    for parameter in rank_parameters(sizes, ParallelLayout(), 0):
        size = math.prod(parameter.shape)
        total += size
        active += size * (model.topk_per_group / sizes.num_experts_per_group if parameter.is_expert else 1.0)
        trained += size * model.is_trained(parameter.name)
    return ParameterCounts(total, round(active), trained)


def _adapters(layer: str, sizes: Sizes, inputs: int, outputs: dict[str, int]) -> Iterator[LocalParameter]:
    """A and B of the linear layers that one of Megatron's stands for."""
    for name, size in outputs.items() if sizes.lora_rank else ():
        yield LocalParameter(f"{layer}.lora.{name}_a", (sizes.lora_rank, inputs))
        yield LocalParameter(f"{layer}.lora.{name}_b", (size, sizes.lora_rank))


def _moe_parameters(sizes: Sizes, layout: ParallelLayout, name: str, ep_rank: int) -> Iterator[LocalParameter]:
    n, hidden, inner = sizes.num_experts_per_group, sizes.hidden_size, sizes.moe_ffn_hidden_size // layout.etp
    groups = GROUPS[: sizes.num_groups]
    for group in groups:
        yield LocalParameter(f"{name}router.{group}.weight", (n, hidden))
        if sizes.spectral:
            yield LocalParameter(f"{name}router.{group}.spectral_weight", (n, hidden))
        if sizes.router_bias:
            yield LocalParameter(f"{name}router.{group}.bias", (n,))
    has_base, expert = sizes.base_expert and ep_rank == 0, partial(LocalParameter, is_expert=True)
    blocks = {"base_expert": int(has_base)} | {f"{group}_experts": n // layout.ep - has_base for group in groups}
    for block, count in blocks.items():
        if count:
            yield expert(f"{name}experts.{block}.linear_fc1.weight", (count, 2 * inner, hidden))
            yield expert(f"{name}experts.{block}.linear_fc2.weight", (count, hidden, inner))
    if shared := sizes.shared_ffn_hidden_size // layout.tp:
        yield LocalParameter(f"{name}shared_experts.linear_fc1.weight", (2 * shared, hidden))
        yield LocalParameter(f"{name}shared_experts.linear_fc2.weight", (hidden, shared))
