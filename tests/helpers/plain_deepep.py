"""What DeepEP's two calls give back, in plain torch over gloo: Megatron's flex dispatcher runs without a GPU.

DeepEP sends a token once to each rank that holds at least one of its chosen experts, with the experts' local ids (-1
for those that are elsewhere) and probabilities; on the way back it adds up what the ranks return. Its kernels, layouts
and limits are not tested by this.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe import token_dispatcher


def install() -> None:
    """Put the calls in DeepEP's place (a prelude for `forked.Job`)."""
    token_dispatcher.fused_dispatch = _dispatch
    token_dispatcher.fused_combine = _combine
    token_dispatcher.set_deepep_num_sms = lambda number: None


def _dispatch(
    x: torch.Tensor, token_indices: torch.Tensor, token_probs: torch.Tensor, num_experts: int, group: Any, **flags: Any
) -> tuple[Any, ...]:
    """[T, H], ids [T, k], float32 [T, k] -> this rank's [R, H], local ids [R, k], probs [R, k], counts, handle."""
    assert token_probs.dtype == torch.float32
    lengths = torch.empty(group.size(), dtype=torch.long)
    torch.distributed.all_gather_into_tensor(lengths, torch.tensor([len(x)]), group=group)
    sizes = lengths.tolist()
    tokens, indices, probs = (
        gather_from_sequence_parallel_region(part, group=group, output_split_sizes=sizes)
        for part in (x, token_indices, token_probs)
    )
    n = num_experts // group.size()
    local = indices - group.rank() * n
    is_here = (local >= 0) & (local < n)
    rows = is_here.any(dim=1).nonzero().squeeze(1)
    local = local.masked_fill(~is_here, -1)[rows]
    counts = torch.bincount(local[local >= 0], minlength=n)
    return tokens[rows], local, (probs * is_here)[rows], counts, (rows, sizes)


def _combine(x: torch.Tensor, group: Any, handle: Any, **flags: Any) -> tuple[torch.Tensor, None]:
    """[R, H] -> [T, H], the sum of what all ranks give back for a token of this rank."""
    rows, sizes = handle
    whole = x.new_zeros(sum(sizes), x.shape[1]).index_add(0, rows, x)
    return reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=sizes), None
