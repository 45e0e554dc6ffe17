"""One forward step: fetch a batch, run the model, sum the masked loss.

This code never makes the host wait for the device: an answer asked of a tensor on the device comes when all work queued
before it is done, and the device then idles until new work arrives. So every rank reads its batch itself (the receivers
of a broadcast would have to learn its shape), what the host must know is read from the copy in the host's memory, and
copies to the device are asynchronous. tests/unit/test_host_syncs.py holds to it. Megatron's own check of each
micro-batch's loss does wait; --no-check-for-nan-in-loss-and-grad leaves it out.

Shape legend: B samples of a micro-batch, S sequence length (padded; the local part of it under context parallelism).
With --pack a micro-batch is one row (B is 1) of whole documents, end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers

from mixmoe_megatron.megatron_patches.throughput import count_lengths
from mixmoe_megatron.model.loss_rows import losses_of_rows, rows_with_loss

#: On a GPU the number of rows with logits is a multiple of it: few sizes, and whole tiles of a matrix product.
GPU_ROWS = 64
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "padding_mask")


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Fetch one micro-batch, the same on every rank of a tensor-parallel group, and copy this rank's part of it.

    Args:
        data_iterator: yields dicts of [B, S] tensors in pinned host memory: tokens, labels, position_ids int64,
            loss_mask float32 and, if there may be padding, padding_mask bool, True where there is.

    Returns:
        The whole batch on the host, and this rank's part on the device. padding_mask is left out of the latter where
        nothing is padded, so that the aux losses count all tokens without a masked copy.
    """
    host = next(data_iterator)
    padded = "padding_mask" in host and bool(host["padding_mask"].any())
    keys = BATCH_KEYS if padded else BATCH_KEYS[:-1]
    batch = {key: host[key].cuda(non_blocking=True) for key in keys}
    return host, get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def document_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Return where the documents of a packed row begin, and its length: [documents + 1] int32, on the host.

    Args:
        position_ids: [1, S] int64 on the host; 0 where a document, or the padding at the end, begins.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.cat([starts, torch.tensor([position_ids.numel()])]).to(torch.int32)


def packed_documents(bounds: torch.Tensor, on_device: bool) -> PackedSeqParams:
    """Tell Megatron where documents begin in a packed row: attention and rotary positions keep to each.

    Args:
        bounds: [documents + 1] int32, `document_bounds`.
        on_device: copy them there, where Transformer Engine's kernels want them. The local modules split by them on
            the host, in each layer.
    """
    # The longest document, no more: with a rotary table as long as the row Megatron would not restart the positions.
    longest = int(bounds.diff().max())
    if on_device:
        bounds = bounds.cuda(non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def document_lengths(host: dict[str, torch.Tensor], bounds: torch.Tensor | None) -> torch.Tensor:
    """Return the lengths of a parallel micro-batch's documents without padding, [documents] integers, on the host.

    Args:
        host: the batch, `get_batch`.
        bounds: of its documents if it is packed: the padding behind them counts as one, here of length 0.
    """
    lengths = (~host["padding_mask"]).sum(dim=1)
    return lengths if bounds is None else bounds.clamp(max=lengths).diff()


def rows_of_logits(loss_mask: torch.Tensor, model: torch.nn.Module) -> torch.Tensor | None:
    """Choose the rows of which this rank computes logits, `rows_with_loss` on the device; None: of all.

    Only a model's last part has logits, and monolingual text carries loss (nearly) everywhere: None for both.

    Args:
        loss_mask: [B, S] float32 on the host, of the whole batch.
        model: the (wrapped) model chunk.
    """
    if not get_attr_wrapped_model(model, "post_process"):
        return None
    group = mpu.get_context_parallel_group()
    mask = get_batch_on_this_cp_rank({"loss_mask": loss_mask}, is_hybrid_cp=False, cp_group=group)["loss_mask"]
    on_gpu = torch.cuda.is_available()
    rows = rows_with_loss(mask, math.lcm(GPU_ROWS if on_gpu else 1, mpu.get_tensor_model_parallel_world_size()))
    if rows is None:
        return None
    return (rows.pin_memory() if on_gpu else rows).cuda(non_blocking=True)


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
            rejection_func=lambda x: ~torch.isfinite(x),
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


def forward_step(
    data_iterator: Any, model: torch.nn.Module, lpr_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Run one micro-batch through the model (Megatron's `forward_step_func`).

    Args:
        data_iterator: see `get_batch`.
        model: the (wrapped) model chunk.
        lpr_scale: [] float32 on the device: in place of a padding mask the batch has 1 for tokens that count in the LPR
            loss and 0 for others, float32, and this is what each of them counts (`lpr_step.py`).

    Returns:
        The model's output, on the last pipeline stage per-token losses [B, S] (0 where none was computed), and the loss
        function.
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    host, batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    bounds = document_bounds(host["position_ids"]) if args.pack else None
    packed = None if bounds is None else packed_documents(bounds, on_device=args.transformer_impl != "local")
    if args.dataloader_type == "external":
        count_lengths(document_lengths(host, bounds), model)
    padding_mask = batch.get("padding_mask")
    if padding_mask is not None and args.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
        # Megatron cuts the mask beside the embedding only: on later pipeline stages the routers would get all of it.
        padding_mask = tensor_parallel.scatter_to_sequence_parallel_region(padding_mask.t().contiguous()).t()
    if padding_mask is not None and lpr_scale is not None:
        padding_mask = padding_mask * lpr_scale
    rows = rows_of_logits(host["loss_mask"], model)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        padding_mask=padding_mask,
        packed_seq_params=packed,
        output_processor=None if rows is None else losses_of_rows,
        output_processor_context=rows,
    )
    return output, partial(loss_func, batch["loss_mask"])
