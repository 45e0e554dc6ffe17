"""The training step of MoE-LPR's second phase: the routers are told which tokens are of original languages.

Its loss is a mean over the tokens of original languages of the whole global batch. How many these are must be known
before the first backward pass: so the micro-batches of a step are read together, and the data-parallel ranks add up
their counts. The mean does then not depend on micro-batch size or layout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args

from mixmoe_megatron.training.step import forward_step

Batch = dict[str, torch.Tensor]


class LPRStep:
    """Megatron's `forward_step_func` for a phase with the LPR loss; in validation it is `forward_step`."""

    def __init__(self) -> None:
        # By iterator, of which a virtual pipeline has several: the rest of a step's micro-batches, and the scale.
        self._ahead: dict[int, tuple[deque[Batch], torch.Tensor]] = {}

    def __call__(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        """Run one micro-batch, see `forward_step`.

        Args:
            data_iterator: see `step.get_batch`; "is_original", [B] bool, tells a sample's language.
            model: the (wrapped) model chunk.
        """
        if not model.training:
            return forward_step(data_iterator, model)
        key = id(data_iterator)
        if key not in self._ahead:
            batches = deque(_with_mask(next(data_iterator)) for _ in range(get_num_microbatches()))
            self._ahead[key] = batches, _scale(batches)
        batches, scale = self._ahead[key]
        batch = batches.popleft()
        if not batches:
            del self._ahead[key]
        return forward_step(iter([batch]), model, scale)


def _with_mask(batch: Batch) -> Batch:
    """Add what stands for a padding mask: [B, S] float32, 1 for the tokens of original languages."""
    mask = batch["is_original"][:, None].expand_as(batch["tokens"]).float()
    return {**batch, "padding_mask": mask.contiguous()}


def _scale(batches: deque[Batch]) -> torch.Tensor:
    """Return what a token counts, so that with what Megatron does to all gradients the loss is the mean; [] float32.

    Megatron divides by the micro-batches and the data-parallel ranks, or with --calculate-per-token-loss by the tokens
    that count in the main loss.
    """
    sums = torch.tensor(
        [[float(batch["padding_mask"].sum()), float(batch["loss_mask"].sum())] for batch in batches],
        dtype=torch.float64,
    ).sum(dim=0)
    sums = sums.cuda(non_blocking=True)
    torch.distributed.all_reduce(sums, group=mpu.get_data_parallel_group())
    counted, tokens = sums.float().unbind()
    if not get_args().calculate_per_token_loss:
        tokens = torch.full_like(counted, len(batches) * mpu.get_data_parallel_world_size())
    return tokens / counted.clamp_min(1)
