"""Logging of each group's aux loss in Megatron's training log, TensorBoard and W&B."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker

from mixmoe_megatron.router import GROUPS, aux_loss_name

_MEGATRON_NAME = "load_balancing_loss"


class MixMoEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, reporting the groups' aux losses where Megatron asks for its one.

    The value is the mean over MoE layers of the raw loss: 1 when balanced, num_experts_per_group at collapse.

    Args:
        stage: 1 (LM) or 2 (LM and MT).
    """

    def __init__(self, stage: int):
        super().__init__()
        self.names = [aux_loss_name(group) for group in GROUPS[:stage]]

    def report(self, *args: Any, track_names: str | list[str] | None = None, **kwargs: Any) -> str:
        """Report as Megatron's tracker. `track_names`: Megatron's own name stands for the groups' names.

        Megatron passes force_initialize=True, so that every pipeline rank takes part in the reduction, those without
        an MoE layer too.
        """
        asked = [track_names] if isinstance(track_names, str) else list(track_names or [_MEGATRON_NAME])
        names = [name for name in asked if name != _MEGATRON_NAME]
        if _MEGATRON_NAME in asked:
            names = self.names + names
        return super().report(*args, track_names=names, **kwargs)


def install_metrics_tracker(stage: int) -> MixMoEMetricsTracker:
    """Make a MixMoEMetricsTracker the process's tracker and return it. Call before training starts.

    Args:
        stage: 1 or 2.
    """
    tracker = MixMoEMetricsTracker(stage)
    set_moe_metrics_tracker(tracker)
    return tracker
