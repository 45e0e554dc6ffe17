"""Bytes of weights, gradients and optimizer on a rank, exactly.

Exact means: what Megatron allocates for them with `--use-distributed-optimizer`, padding of its buffers included. Not
counted: rotary tables and other constants, the steps of Adam (host scalars), what a collective or the optimizer step
holds for a moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import PerBufferParamLayout

from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout
from mixmoe_megatron.planning.parameters import rank_parameters

_ADAM_BYTES = 8  # two float32 averages
_MAIN_WEIGHT_BYTES = 4  # the float32 copy of a bfloat16 weight


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


def stage_memory(model: ModelDescription, layout: ParallelLayout, batch: Batch, pp_rank: int) -> list[Memory]:
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
    different = 2 if model.sizes.base_expert else 1  # the first of the ranks that share out the experts, the others
    kinds = [_held(model, layout, batch, pp_rank, ep_rank) for ep_rank in range(min(layout.ep, different))]
    places = range(layout.world_size // layout.pp)
    return [kinds[min(place // layout.etp % layout.ep, len(kinds) - 1)][place] for place in places]


def _held(model: ModelDescription, layout: ParallelLayout, batch: Batch, pp_rank: int, ep_rank: int) -> list[Memory]:
    """What the ranks of a pipeline stage would hold if all had the parameters of this place among those for experts."""
    dtype = torch.bfloat16 if batch.dtype == "bf16" else torch.float32
    frozen, trained = 0, []
    for local in rank_parameters(model.sizes_under(layout.tp), layout, pp_rank, ep_rank):
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
