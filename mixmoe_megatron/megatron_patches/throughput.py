"""Tokens a second and the share of the device's peak, with the operations of a step counted for Mix-MoE.

Megatron counts every weight as trained and every layer as run backward, whatever is frozen, a batch as full whatever
its padding, and logits of every token. `Throughput.count_step` takes the place of its count, so that Megatron's own
line of --log-throughput is right too.

Source: `megatron.training.training.num_floating_point_operations` and `update_seqlen_stats_from_cu_seqlens`, read at
megatron-core 0.19.2.
"""

from __future__ import annotations

import torch
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers, training

from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.model.flops import peak_flops, step_flops
from mixmoe_megatron.model.metrics import install_metrics_tracker
from mixmoe_megatron.model.options import OPTION_NAMES, MixMoEOptions
from mixmoe_megatron.model.sizes import model_sizes
from mixmoe_megatron.training.datasets import loss_share
from mixmoe_megatron.training.megatron_args import MegatronArgs


class Throughput:
    """What was done since the last log line.

    Args:
        args: Megatron's validated namespace, Mix-MoE options applied.
    """

    def __init__(self, args: MegatronArgs):
        options = MixMoEOptions(**{name: getattr(args, name) for name in OPTION_NAMES}) if args.mixmoe_stage else None
        self.sizes = model_sizes(
            vars(args), options, args.mixmoe_stage, args.padded_vocab_size, args.new_layers, args.lora_rank
        )
        self.phase = PHASES[args.phase]
        self.topk = options.topk_per_group if options else 1
        self.loss_share = loss_share(args)  # of all epochs; a step's own may differ a little
        self.world_size = args.world_size
        self.peak = None
        if torch.cuda.is_available() and (args.bf16 or args.fp16):
            self.peak = peak_flops(torch.cuda.get_device_name())
        self._step = (0.0, 0.0)
        self._tokens = self._flops = 0.0

    def count_step(
        self,
        args: MegatronArgs,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        """Return the operations of a step, all ranks together (Megatron's `num_floating_point_operations`).

        Args:
            args: Megatron's namespace.
            batch_size: samples in the step.
            seqlen_squared_sum_in_batch: sum of the squared lengths of the samples; None: all are seq_length long.
            total_real_tokens_in_batch: tokens in the step without padding; None: all samples are seq_length long.
        """
        tokens = total_real_tokens_in_batch or float(batch_size * args.seq_length)
        squares = seqlen_squared_sum_in_batch or tokens * args.seq_length
        flops = step_flops(
            self.sizes, self.phase, self.topk, tokens, squares / tokens, loss_share=self.loss_share
        ).total
        self._step = (tokens, flops)  # Megatron counts a step once more when it logs
        return flops

    def end_step(self) -> None:
        """Add the step that was counted last to the interval."""
        self._tokens += self._step[0]
        self._flops += self._step[1]

    def rates(self, begin_interval: bool) -> dict[str, float]:
        """Return tokens and operations a second since the last log line, by name.

        Args:
            begin_interval: count anew after this.
        """
        seconds = get_timers()("interval-time").elapsed(reset=False)
        per_rank = self._flops / seconds / self.world_size
        rates = {"tokens_per_second": self._tokens / seconds, "tflops_per_rank": per_rank / 1e12}
        if self.peak is not None:
            rates["share_of_peak"] = per_rank / self.peak
        if begin_interval:
            self._tokens = self._flops = 0.0
        return rates


def count_lengths(lengths: torch.Tensor, model: torch.nn.Module) -> None:
    """Tell Megatron the lengths of a micro-batch's documents, [documents] integers on the host; it sums over ranks."""
    if model.training and not get_attr_wrapped_model(model, "vp_stage"):  # each virtual stage reads the batch again
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        training.update_seqlen_stats_from_cu_seqlens(bounds.cuda(non_blocking=True))


def install_metrics(args: MegatronArgs) -> None:
    """Put the count and the metrics of Mix-MoE in Megatron's log, TensorBoard and W&B. Call before training starts.

    Args:
        args: Megatron's validated namespace, Mix-MoE options applied.
    """
    throughput = Throughput(args)
    training.num_floating_point_operations = throughput.count_step
    if args.mixmoe_stage:
        sizes = throughput.sizes
        install_metrics_tracker(
            args.mixmoe_stage,
            sizes.moe_layers,
            sizes.num_experts_per_group,
            args.log_interval,
            throughput,
            has_lpr=args.lpr_coeff > 0,
        )
