"""The router: one softmax and one top-k per expert group, on the hidden state and its spectral features.

Shape legend: S sequence (the local shard under sequence parallelism), B batch, T = S * B tokens, H hidden_size,
G active groups (= stage), n experts per group, E = G * n experts, k experts chosen per group.

Experts have two orders. Logical: LM 0..n-1, MT n..2n-1. Physical, the order of the router's output columns and of
Megatron's expert ids: for each expert-parallel rank [its LM experts | its MT experts], because Megatron gives rank r
the ids [r E / ep, (r + 1) E / ep) and every rank must hold its share of the trained group.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import utils
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from mixmoe_megatron.config import MixMoEOptions, options_and_stage
from mixmoe_megatron.metrics import GROUPS, aux_loss_name, recording_tracker
from mixmoe_megatron.spectral import fold_router_weight


class GroupRouter(torch.nn.Module):
    """Parameters of one group's router: logits = W_h h + W_f f + b, f the spectral features of h.

    Source: Mix-MoE (arXiv:2605.24681) eq. 3-5.

    Args:
        config: the Transformer configuration (initialisation, dtype, sequence parallelism).
        options: the Mix-MoE options.

    Attributes:
        weight: W_h, [n, H] params_dtype.
        spectral_weight: W_f, [n, H] params_dtype; None with the transform "none".
        bias: b, [n] params_dtype, zero at the start; None without router_bias.
    """

    weight: torch.Tensor
    spectral_weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, config: TransformerConfig, options: MixMoEOptions):
        super().__init__()
        self.options = options
        n = options.num_experts_per_group
        has_spectral = options.spectral_transform != "none"
        self._add_parameter("weight", config, (n, config.hidden_size), True)
        self._add_parameter("spectral_weight", config, (n, config.hidden_size), has_spectral)
        self._add_parameter("bias", config, (n,), options.router_bias)

    def _add_parameter(self, name: str, config: TransformerConfig, shape: tuple[int, ...], present: bool) -> None:
        if not present:
            self.register_parameter(name, None)
            return
        # Made on the CPU in float32, as Megatron's own router weight: the same numbers on every rank.
        values = torch.zeros(shape, dtype=torch.float32)
        if config.perform_initialization and len(shape) > 1 and config.init_method is not None:
            config.init_method(values)
        parameter = torch.nn.Parameter(values.to(config.params_dtype))
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the folded weight and the bias. Called as a module: DDP's hook waits for gathered parameters there."""
        return self.folded_weight(), self.float_bias()

    def folded_weight(self) -> torch.Tensor:
        """Return the plain weight that stands for (W_h, W_f): W_h + scale * W_f M, [n, H] float32, differentiable."""
        o = self.options
        return fold_router_weight(
            self.weight, self.spectral_weight, o.spectral_transform, o.spectral_norm, o.spectral_scale, o.spectral_seed
        )

    def float_bias(self) -> torch.Tensor:
        """Return the bias, [n] float32, zero when the router has none."""
        return self.weight.new_zeros(self.weight.shape[0]).float() if self.bias is None else self.bias.float()


class MixMoERouter(TopKRouter):
    """Route each token to its top-k experts in each active group.

    The output's probabilities carry everything that scales an expert's output: s * p (1 without router_prob_scaling)
    times the factor of the group combination (1/2 for "mean" in stage 2). The dispatcher's weighted sum over a token's
    experts is then the layer's output.

    Source: Mix-MoE (arXiv:2605.24681) eq. 3-7. Deviates: README, table of decisions (combine, scale).

    Args:
        config: a MixMoETransformerConfig.
        pg_collection: Megatron's process groups.
        is_mtp_layer: passed on to Megatron.

    Raises:
        MixMoEError: the config does not go with Mix-MoE.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ):
        self.options, self.stage = options_and_stage(config)
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.weight = None  # Megatron's one weight for all experts gives way to the group routers
        self.lm = GroupRouter(config, self.options)
        if self.stage == 2:
            self.mt = GroupRouter(config, self.options)
        self.ep_size = utils.get_pg_size(pg_collection.ep if pg_collection is not None else None)
        self.group_aux_loss_coeff = self.get_aux_loss_coeff("aux_loss") / self._aux_loss_divisor()

    def reset_parameters(self) -> None:
        """Do nothing: Megatron's own weight is dropped, the group routers initialise themselves."""

    def _aux_loss_divisor(self) -> int:
        """Number of MoE layers with lb_reduction "mean", else 1."""
        frequency = self.config.moe_layer_freq
        if self.options.lb_reduction == "sum":
            return 1
        return sum(frequency) if isinstance(frequency, list) else -(-self.config.num_layers // frequency)

    def group_routers(self) -> list[GroupRouter]:
        """Return the routers of the active groups, in logical order."""
        return [self.lm, self.mt] if self.stage == 2 else [self.lm]

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits of all experts in logical order: `[..., H]` any float dtype -> `[..., E]` float32."""
        weights, biases = zip(*(group() for group in self.group_routers()), strict=True)
        return _RouterLinear.apply(input, torch.cat(weights), torch.cat(biases))

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            input: hidden states after the RMSNorm, [S, B, H], any float dtype.
            padding_mask: [S, B] bool, True = padding, left out of the aux losses; None: no padding.

        Returns:
            probs: [T, E] float32, physical order, zero off the chosen experts and positive on them.
            routing_map: [T, E] bool, exactly G * k True in each row, k in each group.
        """
        return self.routing(self.gating(input), padding_mask)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn logits, [S, B, E] float32 in logical order, into `forward`'s result. Attaches the aux losses."""
        k = self.options.topk_per_group
        logits = logits.reshape(-1, self.stage, self.options.num_experts_per_group)  # [T, G, n]
        scores = logits.softmax(dim=-1)
        chosen = logits.topk(k, dim=-1).indices  # not of the probabilities: several of them underflow to the same 0
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        valid = None if padding_mask is None else ~padding_mask.reshape(-1)
        probs = self._scale(scores, routing_map, valid)
        if tracker := recording_tracker(self):
            tracker.record_routing(self.layer_number, scores, routing_map, valid)
        if self.training and torch.is_grad_enabled() and self.group_aux_loss_coeff > 0:
            for index in range(self.stage):
                probs = self._attach_aux_loss(probs, scores[:, index], routing_map[:, index], valid, GROUPS[index])
        return self._to_physical_order(probs), self._to_physical_order(routing_map)

    def _scale(self, scores: torch.Tensor, routing_map: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Return the factor of each chosen expert's output, 0 elsewhere. [T, G, n] -> [T, G, n] float32.

        Padding (`valid` [T] is False) gets next to nothing, so that the norm of what experts give out is the tokens';
        not 0 (nor so small that it slows a CPU), because the flex dispatcher finds the chosen experts by their probs.
        """
        combine = 1.0 / self.stage if self.options.group_combine == "mean" else 1.0
        if self.options.router_prob_scaling:
            # The flex dispatcher finds the chosen experts again by their probs: none may underflow to 0.
            factor, smallest = self.options.resolved_expert_scale * combine, torch.finfo(torch.float32).tiny
            scaled = (scores * factor).clamp_min(smallest)
        else:
            scaled = scores * 0.0 + combine  # a zero gradient, not none: DDP waits for every trained parameter
        if valid is not None:
            scaled = scaled.where(valid[:, None, None], 2.0**-60)
        return scaled * routing_map

    def _attach_aux_loss(
        self,
        probs: torch.Tensor,
        scores: torch.Tensor,
        routing_map: torch.Tensor,
        valid: torch.Tensor | None,
        group: str,
    ) -> torch.Tensor:
        """Attach a group's aux loss n * sum_i f_i P_i to `probs` and record its raw value (1 when balanced).

        It is attached in stage 2 for the frozen LM router too: through h it trains MT experts of earlier layers.

        Source: Mix-MoE (arXiv:2605.24681) eq. 8-9. Deviates: README (normalisation, mean over layers).

        Args:
            probs: [T, G, n] float32, the tensor that carries the gradient.
            scores: [T, n] float32, the group's softmax.
            routing_map: [T, n] bool.
            valid: [T] bool, False = padding; None: no padding.
            group: "lm" or "mt".
        """
        if valid is not None:
            scores, routing_map = scores * valid.unsqueeze(-1), routing_map & valid.unsqueeze(-1)
        num_local_tokens = scores.new_full((), len(scores), dtype=torch.long) if valid is None else valid.sum()
        ranks = utils.get_pg_size(self.tp_cp_group)
        with torch.no_grad():
            # Expert counts and the token count of all ranks that share this batch's sequences, in one reduction.
            counts = torch.cat([routing_map.sum(dim=0), num_local_tokens.reshape(1)])
            if ranks > 1:
                torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        num_tokens = counts[-1].clamp_min(1)
        aux_loss = switch_load_balancing_loss_func(
            probs=scores,
            tokens_per_expert=counts[:-1],
            total_num_tokens=num_tokens,
            topk=self.options.topk_per_group,
            num_experts=self.options.num_experts_per_group,
            moe_aux_loss_coeff=self.group_aux_loss_coeff,
        )
        return self.attach_and_log_load_balancing_loss(
            probs,
            self.group_aux_loss_coeff,
            aux_loss,
            aux_loss_name(group),
            self.tp_cp_group,
            # With --calculate-per-token-loss Megatron multiplies by this times the number of ranks. The mean, not this
            # rank's own count: padding is not spread evenly over the sequence shards.
            valid_token_count=num_tokens / ranks,
        )

    def _to_physical_order(self, columns: torch.Tensor) -> torch.Tensor:
        """Reorder experts from logical to physical: [T, G, n] -> [T, E]."""
        tokens, groups, n = columns.shape
        per_rank = columns.reshape(tokens, groups, self.ep_size, n // self.ep_size).transpose(1, 2)
        return per_rank.reshape(tokens, groups * n)


class _RouterLinear(torch.autograd.Function):
    """x W^T + b in float32 that keeps x in its own dtype for the backward pass (half the memory in bf16)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x.float(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        rows = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = (grad @ weight).to(x.dtype) if need_x else None
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1]).float() if need_weight else None
        return grad_x, grad_weight, rows.sum(dim=0) if need_bias else None
