"""One forward step: fetch and distribute a batch, run the model, sum the masked loss.

Shape legend: B samples of a micro-batch, S sequence length (padded; the local part of it under context parallelism).
With --pack a micro-batch is one row (B is 1) of whole documents, end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers

from mixmoe_megatron.training.throughput import count_lengths

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "padding_mask")


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]] | None) -> dict[str, torch.Tensor]:
    """Fetch one micro-batch on tensor-parallel rank 0 and give every rank of the group its part.

    Args:
        data_iterator: yields dicts of [B, S] tensors; None on ranks that build no dataset.

    Returns:
        tokens, labels, position_ids: [B, S] int64. loss_mask: [B, S] float32. padding_mask: [B, S] bool, True where
        there is padding. lengths: [B] int64, tokens of each whole sample without padding.
    """
    batch = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        batch = next(data_iterator)
        if "padding_mask" not in batch:
            batch["padding_mask"] = torch.zeros_like(batch["tokens"])
        batch = {key: batch[key].to(torch.int64) for key in BATCH_KEYS}
    batch = tensor_parallel.broadcast_data(BATCH_KEYS, batch, torch.int64)
    lengths = (batch["padding_mask"] == 0).sum(dim=1)
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    batch["loss_mask"] = batch["loss_mask"].float()
    batch["padding_mask"] = batch["padding_mask"].bool()
    batch["lengths"] = lengths
    return batch


def packed_documents(position_ids: torch.Tensor) -> PackedSeqParams:
    """Tell Megatron where documents begin in a packed row: attention and rotary positions keep to each.

    Args:
        position_ids: [1, S] int64; 0 where a document, or the padding at the end, begins.
    """
    ends = torch.tensor([position_ids.numel()], device=position_ids.device)
    bounds = torch.cat([(position_ids.flatten() == 0).nonzero().flatten(), ends]).to(torch.int32)
    # The longest document, no more: with a rotary table as long as the row Megatron would not restart the positions.
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses where the mask counts (eq. 8 and 9, first term; Megatron divides).

    Args:
        loss_mask: [B, S] float32, 1 where the label counts.
        output_tensor: [B, S] per-token cross entropy, nats.

    Returns:
        The summed loss (nats), the number of tokens that Megatron divides it by (int32), sum and count for the log.
    """
    args = get_args()
    loss_mask = loss_mask.view(-1)
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum()
    report = {"lm loss": torch.stack([loss.detach(), num_tokens])}
    if args.check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda x: not torch.isfinite(x),
            message="the loss of a micro-batch is not a finite number",
            tolerance=0.0,
            fatal=True,
        )
    if args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        # Megatron divides by this rank's count and averages over ranks; targets are not spread evenly over them.
        all_tokens = num_tokens.clone()
        torch.distributed.all_reduce(all_tokens, group=mpu.get_context_parallel_group())
        loss = loss * num_tokens.clamp_min(1) * args.context_parallel_size / all_tokens.clamp_min(1)
    return loss, num_tokens.to(torch.int), report


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Run one micro-batch through the model (Megatron's `forward_step_func`).

    Args:
        data_iterator: see `get_batch`.
        model: the (wrapped) model chunk.

    Returns:
        The model's output, per-token losses [B, S] on the last pipeline stage, and the loss function.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    packed = packed_documents(batch["position_ids"]) if get_args().pack else None
    if get_args().dataloader_type == "external":
        lengths = batch["lengths"]  # of a packed row: all its tokens; the padding behind them is a document too
        count_lengths(lengths if packed is None else packed.cu_seqlens_q.clamp(max=lengths).diff(), model)
    # Without padding no mask is passed, so that the aux losses count all tokens without a masked copy.
    padding_mask = batch["padding_mask"] if bool(batch["padding_mask"].any()) else None
    if padding_mask is not None and get_args().sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
        # Megatron cuts the mask beside the embedding only: on later pipeline stages the routers would get all of it.
        padding_mask = tensor_parallel.scatter_to_sequence_parallel_region(padding_mask.t().contiguous()).t()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        padding_mask=padding_mask,
        packed_seq_params=packed,
    )
    return output, partial(loss_func, batch["loss_mask"])
