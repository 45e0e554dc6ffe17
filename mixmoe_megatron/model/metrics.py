"""What operators watch: load, router probability, aux loss and output norm of each group, layer by layer.

All is summed on the device, without a synchronisation, and averaged over the steps, micro-batches and tokens since the
last log line, the time span of Megatron's own averages. When Megatron logs, one all-reduce brings the ranks together.

The log line, TensorBoard and W&B get the means over the MoE layers, and with --moe-per-layer-logging TensorBoard and
W&B each layer too (`moe/NAME_layer_I`, I from 0, and each expert's load). Names, with "lm_" or "mt_" in front:

- `load_balancing_loss`: the raw aux loss: 1 when balanced, num_experts_per_group at collapse;
- `load_max`, `load_entropy`, `load_variation`: of the experts' shares of the routed tokens the largest, the entropy
  (nats, log(num_experts_per_group) when balanced) and the coefficient of variation (0 when balanced);
- `router_prob`: mean probability that the router gave a chosen expert;
- `output_norm`: root mean square over tokens of the norm of a chosen expert's output, as it enters the layer's sum;
  of the logged step alone, because under expert tensor parallelism it takes an all-reduce of all outputs.

MoE-LPR adds `lpr_loss`: the mean over tokens of original languages of -log p, p the base expert's probability (in the
form `lpr_impl`); 0 where there was no such token. In stage 2 `mt_lm_norm_ratio` is the quotient of the output norms.
Padding counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core import utils
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)

from mixmoe_megatron.methods.mixmoe import GROUPS

_AUX_LOSS = "load_balancing_loss"
# Columns of the sums behind the n token counts of the experts.
_PROB, _AUX, _AUX_COUNT, _SQUARED_NORM, _NORM_COUNT, _LPR, _LPR_COUNT = range(7)
_NUM_COLUMNS = 7


class Rates(Protocol):
    """Values a second for the log (`megatron_patches.throughput.Throughput`)."""

    def end_step(self) -> None:
        """Count the step that ended."""

    def rates(self, begin_interval: bool) -> dict[str, float]:
        """Return the values since the last log line by name; `begin_interval`: count anew after this."""
        ...


class MixMoEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE metrics, for expert groups.

    Args:
        stage: 1 (LM) or 2 (LM and MT).
        moe_layers: 0-based indices of the MoE layers of the whole model.
        num_experts_per_group: n, the experts of each group.
        log_interval: steps between log lines.
        rates: what gives values a second to the log; None: nothing does.
        has_lpr: whether training has the LPR loss.
    """

    def __init__(
        self,
        stage: int,
        moe_layers: Sequence[int],
        num_experts_per_group: int,
        log_interval: int = 1,
        rates: Rates | None = None,
        has_lpr: bool = False,
    ):
        super().__init__()
        self.groups, self.moe_layers, self.num_experts = GROUPS[:stage], list(moe_layers), num_experts_per_group
        self.log_interval, self.rates, self.has_lpr = log_interval, rates, has_lpr
        self._sums: torch.Tensor | None = None
        self._logged = False  # whether a line was logged
        self._logs_next = True  # whether the step that runs will be logged

    def _row(self, layer_number: int, device: torch.device | str | int) -> torch.Tensor:
        """The sums of a layer (1-based), [G, n + 7] float64: tokens of each expert, then the columns above."""
        if self._sums is None:
            shape = (len(self.moe_layers), len(self.groups), self.num_experts + _NUM_COLUMNS)
            self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        return self._sums[self.moe_layers.index(layer_number - 1)]

    def record_aux_losses(self, layer_number: int, values: torch.Tensor, ranks: int) -> None:
        """Add a micro-batch's raw aux losses.

        Args:
            layer_number: 1-based.
            values: [G] float32, this rank's summands.
            ranks: number of ranks whose summands make up the aux losses.
        """
        row = self._row(layer_number, values.device)
        row[:, self.num_experts + _AUX].add_(values)
        row[:, self.num_experts + _AUX_COUNT].add_(1.0 / ranks)

    def record_routing(
        self, layer_number: int, scores: torch.Tensor, routing_map: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Add a micro-batch's choices.

        Args:
            layer_number: 1-based.
            scores: [T, G, n] float32, the groups' softmax, without a gradient.
            routing_map: [T, G, n] bool, False for padding.
            counts: [G, n] integers, its sum over the tokens.
        """
        row = self._row(layer_number, scores.device)
        row[:, : self.num_experts].add_(counts)
        row[:, self.num_experts + _PROB].add_((scores * routing_map).sum(dim=(0, 2)))
        if self._logs_next:
            row[:, self.num_experts + _NORM_COUNT].add_(counts.sum(dim=-1))

    def record_lpr(self, layer_number: int, values: torch.Tensor, counts: torch.Tensor) -> None:
        """Add a micro-batch's LPR loss.

        Args:
            layer_number: 1-based.
            values: [T] float32, -log p of the base expert.
            counts: [T] bool, True for tokens of original languages.
        """
        row = self._row(layer_number, values.device)
        row[0, self.num_experts + _LPR].add_((values * counts).sum())
        row[0, self.num_experts + _LPR_COUNT].add_(counts.sum())

    def record_output(
        self, layer_number: int, group: int, output: torch.Tensor, tp_group: torch.distributed.ProcessGroup | None
    ) -> None:
        """Add the squared norm of a group's expert outputs, [T, H], in a step that will be logged.

        Zero rows (padding) change nothing.

        Args:
            layer_number: 1-based.
            group: index in GROUPS.
            output: [T, H], what this rank's experts give; under expert tensor parallelism a summand of the output.
            tp_group: the expert tensor parallel group.
        """
        if not self._logs_next:
            return
        output, ranks = output.detach(), utils.get_pg_size(tp_group)
        if ranks > 1:
            output = output.clone()
            torch.distributed.all_reduce(output, group=tp_group)
        norm = torch.linalg.vector_norm(output, dtype=torch.float32)
        column = self._row(layer_number, output.device)[group, self.num_experts + _SQUARED_NORM]
        column.add_(norm.square(), alpha=1.0 / ranks)

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        per_layer_logging: bool = False,
        **kwargs: Any,
    ) -> str:
        """Log when Megatron does: on its first step and every `log_interval` steps. All ranks call it on every step.

        As Megatron, it keeps the sums of the first step for the first whole interval.

        Args:
            loss_scale: not used, micro-batches are counted.
            iteration: number of the step that ended.
            writer: TensorBoard's writer, on one rank.
            wandb_writer: W&B's writer, on one rank.
            per_layer_logging: whether each layer's values are written too.
            kwargs: Megatron's other arguments, which are not needed here.

        Returns:
            The part of the log line, "" between log lines.
        """
        if self.rates is not None:
            self.rates.end_step()
        begins, self._logged = not self._logged, True
        self._logs_next = (iteration + 1) % self.log_interval == 0
        if not begins and iteration % self.log_interval:
            return ""
        if self._sums is None:  # a pipeline stage without an MoE layer
            self._row(self.moe_layers[0] + 1, torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        assert self._sums is not None
        sums = self._sums.clone()
        torch.distributed.all_reduce(sums)
        if not begins:
            self._sums.zero_()
        layers = self._per_layer(sums.cpu())
        values = {name: rows[:, 0].mean().item() for name, rows in layers.items() if rows.shape[1] == 1}
        values |= self.rates.rates(begin_interval=not begins) if self.rates else {}
        written = dict(values)
        if per_layer_logging:
            written |= {
                f"moe/{name}_layer_{layer}" + (f"_expert_{index}" if len(row) > 1 else ""): value
                for name, rows in layers.items()
                for layer, row in zip(self.moe_layers, rows.tolist(), strict=True)
                for index, value in enumerate(row)
            }
        if writer is not None:
            for name, value in written.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log(written, iteration)
        return "".join(f" {name}: {value:.6E} |" for name, value in values.items())

    def clear(self) -> None:
        """Forget what was recorded since the last log line."""
        if self._sums is not None:
            self._sums.zero_()

    def _per_layer(self, sums: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn the sums of all ranks into values by name: [MoE layers, 1], and "GROUP_load" [MoE layers, n]."""
        values: dict[str, torch.Tensor] = {}
        for index, group in enumerate(self.groups):
            counts, columns = sums[:, index, : self.num_experts], sums[:, index, self.num_experts :].unsqueeze(-1)
            routed = counts.sum(dim=1, keepdim=True)
            share = counts / routed
            if columns[:, _AUX_COUNT].all():
                values[f"{group}_{_AUX_LOSS}"] = columns[:, _AUX] / columns[:, _AUX_COUNT]
            values[f"{group}_load_max"] = share.amax(dim=1, keepdim=True)
            values[f"{group}_load_entropy"] = torch.special.entr(share).sum(dim=1, keepdim=True)
            values[f"{group}_load_variation"] = share.std(dim=1, keepdim=True, correction=0) * self.num_experts
            values[f"{group}_router_prob"] = columns[:, _PROB] / routed
            values[f"{group}_output_norm"] = (columns[:, _SQUARED_NORM] / columns[:, _NORM_COUNT]).sqrt()
            values[f"{group}_load"] = share
        if self.has_lpr:
            columns = sums[:, 0, self.num_experts :].unsqueeze(-1)
            values["lpr_loss"] = columns[:, _LPR] / columns[:, _LPR_COUNT].clamp_min(1)
        if len(self.groups) == 2:
            values["mt_lm_norm_ratio"] = values["mt_output_norm"] / values["lm_output_norm"]
        return values


def recording_tracker(module: torch.nn.Module) -> MixMoEMetricsTracker | None:
    """Return the tracker if `module` is to record this pass: in training, with gradients, and a Mix-MoE tracker is set.

    Under activation recomputation the first of the two passes has no gradients.
    """
    tracker = get_moe_metrics_tracker() if module.training and torch.is_grad_enabled() else None
    return tracker if isinstance(tracker, MixMoEMetricsTracker) else None


def record_aux_losses(
    values: torch.Tensor, layer_number: int | None, num_layers: int, reduce_group: torch.distributed.ProcessGroup | None
) -> None:
    """Tell the process's tracker, Mix-MoE's or Megatron's own, a micro-batch's raw aux losses.

    Args:
        values: [G] float32, summands on each rank of `reduce_group`.
        layer_number: 1-based; None: of no layer, and told to nobody.
        num_layers: layers of the whole model.
        reduce_group: the ranks that share the batch's sequences.
    """
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, MixMoEMetricsTracker):
        for group, value in zip(GROUPS, values, strict=False):
            tracker.record(f"{group}_{_AUX_LOSS}", value, layer_number, num_layers, reduce_group=reduce_group)
    elif layer_number is not None:
        tracker.record_aux_losses(layer_number, values, utils.get_pg_size(reduce_group))


def install_metrics_tracker(*args: Any, **kwargs: Any) -> MixMoEMetricsTracker:
    """Make a MixMoEMetricsTracker the process's tracker and return it. Call this before training starts.

    Args:
        args, kwargs: the arguments of MixMoEMetricsTracker.
    """
    tracker = MixMoEMetricsTracker(*args, **kwargs)
    set_moe_metrics_tracker(tracker)
    return tracker
