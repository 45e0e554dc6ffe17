"""Bytes of weights, gradients and optimizer on a rank, exactly.

Exact means: what Megatron allocates for them with `--use-distributed-optimizer`, padding of its buffers included. Not
counted: rotary tables and other constants, the steps of Adam (host scalars), what a collective or the optimizer step
holds for a moment.

Shape legend: H hidden_size, F ffn_hidden_size, f moe_ffn_hidden_size, Q attention heads x head size, K query groups x
head size, P padded vocabulary, n experts per group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import PerBufferParamLayout

from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.planning.layouts import Batch, Model, ParallelLayout

_ADAM_BYTES = 8  # two float32 averages
_MAIN_WEIGHT_BYTES = 4  # the float32 copy of a bfloat16 weight


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


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank; activations at their peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_parameters(sizes: Sizes, layout: ParallelLayout, pp_rank: int, ep_rank: int = 0) -> Iterator[LocalParameter]:
    """Yield the parameters of a rank of one pipeline stage, in the order of the model's `named_parameters`.

    All ranks of a stage hold parameters of the same shapes; which part of a tensor and which experts differs. A base
    expert lies on the first of the expert-parallel ranks alone, which holds one less of the others.

    Args:
        sizes: of the model, vocabulary padded for the layout (`Model.sizes(layout.tp)`).
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


def count_parameters(model: Model) -> ParameterCounts:
    """Count the parameters of a whole model.

    Args:
        model: the model.
    """
    met = model.options.topk_per_group / model.options.num_experts_per_group
    total, active, trained = 0, 0.0, 0
    for parameter in rank_parameters(model.sizes(), ParallelLayout(), 0):
        size = math.prod(parameter.shape)
        total += size
        active += size * (met if parameter.is_expert else 1.0)
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


def stage_memory(model: Model, layout: ParallelLayout, batch: Batch, pp_rank: int) -> list[Memory]:
    """Return what the ranks of a pipeline stage hold (no activations), in the order of their global ranks.

    Frozen parameters have their weight alone. Trained ones lie in Megatron's buffers, whose layout and padding
    Megatron's own function computes here. The optimizer's state is cut over the data and context parallel ranks, for
    experts over the expert data parallel ranks; what lies in the padding has none.

    Args:
        model: the model.
        layout: the parallel sizes.
        batch: its dtype, grads_in_fp32 and overlap.
        pp_rank: the pipeline stage.
    """
    different = 2 if model.options.base_expert else 1  # the first of the ranks that share out the experts, the others
    kinds = [_held(model, layout, batch, pp_rank, ep_rank) for ep_rank in range(min(layout.ep, different))]
    places = range(layout.world_size // layout.pp)
    return [kinds[min(place // layout.etp % layout.ep, len(kinds) - 1)][place] for place in places]


def _held(model: Model, layout: ParallelLayout, batch: Batch, pp_rank: int, ep_rank: int) -> list[Memory]:
    """What the ranks of a pipeline stage would hold if all had the parameters of this place among those for experts."""
    dtype = torch.bfloat16 if batch.dtype == "bf16" else torch.float32
    frozen, trained = 0, []
    for local in rank_parameters(model.sizes(layout.tp), layout, pp_rank, ep_rank):
        if not model.is_trained(local.name):
            frozen += math.prod(local.shape)
            continue
        parameter = torch.nn.Parameter(torch.empty(local.shape, dtype=dtype, device="meta"))
        parameter.allreduce = not local.is_expert  # type: ignore[attr-defined]
        parameter.shared_embedding = local.is_shared_embedding  # type: ignore[attr-defined]
        trained.append(parameter)
    dense_shards, expert_shards = layout.dp * layout.cp, layout.expert_dp
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=batch.grads_in_fp32, use_distributed_optimizer=True)
    bucket_size = max(40_000_000, 1_000_000 * dense_shards) if batch.overlap and pp_rank == 0 else None  # as Megatron
    buffers = DistributedOptimizer.compute_full_param_layout(
        trained, bucket_size, dense_shards, config, expert_shards
    ).layouts
    padded = sum(buffer.bucket_indices[-1][1] for buffer in buffers.values())
    owned = {key.is_expert_parallel: _owned(buffer) for key, buffer in buffers.items()}
    grad_bytes = 4 if batch.grads_in_fp32 else dtype.itemsize
    state_bytes = _ADAM_BYTES + (_MAIN_WEIGHT_BYTES if batch.dtype == "bf16" else 0)
    result = []
    for place in range(layout.world_size // layout.pp):
        dense = owned[False][place // layout.tp] if False in owned else 0
        expert = owned[True][place // (layout.etp * layout.ep)] if True in owned else 0
        weights = (frozen + padded) * dtype.itemsize
        result.append(Memory(weights, padded * grad_bytes, (dense + expert) * state_bytes))
    return result


def _owned(buffer: PerBufferParamLayout) -> list[int]:
    """Elements of parameters in each rank's share of a buffer."""
    shards = buffer.num_optimizer_shards
    assert shards is not None
    owned = [0] * shards
    for start, end, bucket in buffer.param_index_map.values():
        first, last = buffer.bucket_indices[bucket]
        size = (last - first) // shards
        for shard in range((start - first) // size, (end - 1 - first) // size + 1):
            low = first + shard * size
            owned[shard] += min(end, low + size) - max(start, low)
    return owned
