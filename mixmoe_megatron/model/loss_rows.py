"""Logits of the rows that carry loss alone: of parallel text those are the target's, about half of its tokens.

With a vocabulary of 150,000 words the output layer and its softmax are the largest part of a small model's step, and
where the loss mask is 0 they are computed for nothing: such a row's loss is multiplied by 0, and so is its gradient.
`losses_of_rows` is Megatron's `output_processor`, which takes the place of the output layer and the loss of all rows:

    hidden states [S, B, H] -> rows [N, 1, H] -> output layer -> losses [1, N] -> [B, S], zeros elsewhere

What follows (loss function, token counts, log) sees the tensor that it always saw. The rows are chosen on the host.

Shape legend: B samples of a micro-batch, S their length on this context-parallel rank, N chosen rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

#: Share of the rows above which choosing them, and putting them back, is not worth what it spares.
WORTHWHILE = 0.9


def rows_with_loss(loss_mask: torch.Tensor, multiple: int = 1) -> torch.Tensor | None:
    """Choose the rows whose logits are computed: all with loss, and of the others as few as make a multiple.

    Args:
        loss_mask: [B, S] float32 on the host, not 0 where the label counts.
        multiple: what N is a multiple of, so that a GPU sees few sizes and tensor-parallel ranks have equal parts.

    Returns:
        [N] int64 on the host: places in a [S, B] tensor that is read row by row, each once, N at least 1. None: more
        than WORTHWHILE of the rows would be computed, so all are.
    """
    carries = loss_mask.t().flatten() != 0
    with_loss, without = carries.nonzero().flatten(), (~carries).nonzero().flatten()
    wanted = max(1, -(-len(with_loss) // multiple)) * multiple
    if wanted > WORTHWHILE * len(carries):
        return None
    return torch.cat([with_loss, without[: wanted - len(with_loss)]])


def losses_of_rows(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    runtime_gather_output: bool | None,
    context: torch.Tensor,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    """Return the losses of the chosen rows in their places (`GPTModel.forward(output_processor=losses_of_rows)`).

    Under sequence parallelism the hidden states are gathered here, and the chosen rows handed to the output layer in
    the equal parts that it gathers itself, so that gradients take the ways that Megatron has for them.

    Args:
        hidden_states: [S, B, H] of the final norm, under sequence parallelism this rank's part of S.
        output_layer: Megatron's output layer.
        output_weight: the tied embedding's weight, None: the output layer's own.
        labels: [B, S] int64.
        runtime_gather_output: handed on to the output layer.
        context: `rows_with_loss` on the device, under sequence parallelism N a multiple of the tensor-parallel size.
        compute_language_model_loss: Megatron's loss of labels [1, N] and logits [N, 1, vocabulary].
        scale_logits: Megatron's, for muP.

    Returns:
        [B, S] float32, nats; 0 where no logits were computed.
    """
    batch, length = labels.shape
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
        )
    rows = hidden_states.flatten(0, 1).index_select(0, context).unsqueeze(1)
    if output_layer.sequence_parallel:
        rows = scatter_to_sequence_parallel_region(rows, group=output_layer.tp_group)
    logits, _ = output_layer(rows, weight=output_weight, runtime_gather_output=runtime_gather_output)
    chosen = labels.t().flatten().index_select(0, context).unsqueeze(0)
    losses = compute_language_model_loss(chosen, scale_logits(logits)).flatten()
    return losses.new_zeros(length * batch).index_copy(0, context, losses).view(length, batch).t().contiguous()
