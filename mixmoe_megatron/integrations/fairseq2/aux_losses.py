"""The routers' aux losses of a model of fairseq2, from what the routers said in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq2.nn import BatchLayout
from torch import Tensor, nn

from mixmoe_megatron.hf import router_aux_loss
from mixmoe_megatron.integrations.fairseq2.native_model import MixMoEFeedForward


def mixmoe_ffns(model: nn.Module) -> list[MixMoEFeedForward]:
    """Return the FFNs of a model's Mix-MoE layers in order."""
    return [module for module in model.modules() if isinstance(module, MixMoEFeedForward)]


@contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Record what the routers say inside of this context; what activation checkpointing runs again later is not in it.

    Args:
        model: with Mix-MoE layers.

    Yields:
        For each group, LM first, the logits of its routers, [T, n] float32 of one layer after the other.
    """
    groups = list(zip(*(ffn.groups() for ffn in mixmoe_ffns(model)), strict=True))
    recorded: list[list[Tensor]] = [[] for _ in groups]
    hooks = []
    for routed_groups, logits in zip(groups, recorded, strict=True):

        def record(module: nn.Module, inputs: Any, output: Any, logits: list[Tensor] = logits) -> None:
            logits.append(output[0])

        hooks += [group.router.register_forward_hook(record) for group in routed_groups]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def group_aux_losses(model: nn.Module, recorded: list[list[Tensor]], seqs_layout: BatchLayout) -> Tensor:
    """Return the aux loss of each group, LM first; padding does not count.

    Source: Mix-MoE (arXiv:2605.24681) eq. 8-9.

    Args:
        model: with Mix-MoE layers.
        recorded: of `recorded_router_logits`.
        seqs_layout: of the batch that went in.

    Returns:
        [groups] float32.
    """
    ffns = mixmoe_ffns(model)
    top_k = ffns[0].trained_group.router.top_k
    mask = seqs_layout.position_indices >= 0 if seqs_layout.padded else None
    losses = [router_aux_loss(tuple(logits), 1, top_k, mask)[0] for logits in recorded]
    return torch.stack(losses) * (len(ffns) if ffns[0].lb_reduction == "sum" else 1)
