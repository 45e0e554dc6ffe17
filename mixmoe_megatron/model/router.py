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
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model.config import options_and_stage
from mixmoe_megatron.model.metrics import record_aux_losses, recording_tracker
from mixmoe_megatron.model.options import MixMoEOptions, router_weight_std
from mixmoe_megatron.model.router_rows import new_router_weight
from mixmoe_megatron.model.spectral import fold_router_weight


class GroupRouter(torch.nn.Module):
    """Parameters of one group's router: logits = W_h h + W_f f + b, f the spectral features of h.

    Source: Mix-MoE (arXiv:2605.24681) eq. 3-5. Deviates: D7 (model/README.md).

    Args:
        config: the Transformer configuration (dtype, sequence parallelism).
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
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    @torch.no_grad()
    def draw(self, name: str, init_std: float, seed: int) -> None:
        """Draw the weights anew, as `router_rows.new_router_weight` does; the bias stays.

        Args:
            name: of this router in a checkpoint, such as `decoder.layers.3.mlp.router.lm`.
            init_std: standard deviation of the weights.
            seed: any integer.
        """
        for kind, parameter in self.named_parameters():
            if kind != "bias":
                drawn = new_router_weight(f"{name}.{kind}", tuple(parameter.shape), init_std, seed)
                parameter.copy_(torch.from_numpy(drawn))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the three parameters. Called as a module: DDP's hook waits for gathered parameters there."""
        return self.weight, self.spectral_weight, self.bias


class MixMoERouter(TopKRouter):
    """Route each token to its top-k experts in each active group.

    The output's probabilities carry everything that scales an expert's output: s * p (1 without router_prob_scaling)
    times the factor of the group combination (1/2 for "mean" in stage 2). The dispatcher's weighted sum over a token's
    experts is then the layer's output.

    Source: Mix-MoE (arXiv:2605.24681) eq. 3-7. Deviates: D1, D2 (model/README.md).

    Args:
        config: a MixMoETransformerConfig.
        pg_collection: Megatron's process groups; None: one process.
        kwargs: TopKRouter's other arguments, passed on to Megatron.

    Attributes:
        lpr_weights: [T] float32, what each token counts in the LPR loss of the layer that runs; None: there is none.

    Raises:
        MixMoEError: the config does not go with Mix-MoE.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any):
        self.options, self.stage = options_and_stage(config)
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.weight = None  # Megatron's one weight for all experts gives way to the group routers
        self.lm = GroupRouter(config, self.options)
        if self.stage == 2:
            self.mt = GroupRouter(config, self.options)
        self.ep_size = utils.get_pg_size(pg_collection.ep if pg_collection is not None else None)
        num_terms = sum(config.moe_layer_freq) if self.options.lb_reduction == "mean" else 1
        self.group_aux_loss_coeff = self.get_aux_loss_coeff("aux_loss") / num_terms
        self.lpr_coeff = getattr(config, "lpr_coeff", 0.0) / sum(config.moe_layer_freq)
        self.lpr_softmax_twice = getattr(config, "lpr_impl", "paper") == "released"
        self.lpr_weights: torch.Tensor | None = None
        self._draw()

    def reset_parameters(self) -> None:
        """Do nothing: Megatron's own weight is dropped, and the group routers are drawn when they are there."""

    def set_layer_number(self, layer_number: int) -> None:
        """Set the 1-based number of the layer; once it is known, the weights are drawn for it."""
        was_unknown = self.layer_number is None
        super().set_layer_number(layer_number)
        if was_unknown:
            self._draw()

    def _draw(self) -> None:
        """Draw the groups' weights: the same under every parallel layout, and in conversions with the same seed."""
        if self.config.perform_initialization:
            for group, router in zip(GROUPS, self.group_routers(), strict=False):
                name = f"decoder.layers.{(self.layer_number or 1) - 1}.mlp.router.{group}"
                std = router_weight_std(self.options, self.config.hidden_size, self.config.init_method_std)
                router.draw(name, std, self.config.seed)

    def group_routers(self) -> list[GroupRouter]:
        """Return the routers of the active groups, in logical order."""
        return [self.lm, self.mt] if self.stage == 2 else [self.lm]

    def folded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the linear layer that the groups' routers are, in logical order, differentiable.

        Returns:
            weight: W_h + scale * W_f M, [E, H] float32.
            bias: [E] params_dtype; None without router_bias.
        """
        weight, spectral_weight, bias = map(_stack, zip(*(group() for group in self.group_routers()), strict=True))
        assert weight is not None
        return fold_router_weight(weight, spectral_weight, *self.options.spectral), bias

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits of all experts in logical order: `[..., H]` any float dtype -> `[..., E]` float32."""
        return _RouterLinear.apply(input, *self.folded())

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
        if self.lpr_weights is not None and self.training and torch.is_grad_enabled():
            logits = self._ask_for_the_base_expert(logits, self.lpr_weights)
        scores = logits.softmax(dim=-1)
        # Not the top-k of the probabilities: several of them underflow to the same 0.
        chosen = logits.topk(k, dim=-1, sorted=False).indices
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        valid = None if padding_mask is None else ~padding_mask.reshape(-1)
        if self.training and torch.is_grad_enabled():
            scores = self._record_and_balance(scores, routing_map, valid)
        probs = self._scale(scores, routing_map, valid)
        return self._to_physical_order(probs), self._to_physical_order(routing_map)

    def _scale(self, scores: torch.Tensor, routing_map: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Return the factor of each chosen expert's output, 0 elsewhere. [T, G, n] -> [T, G, n] float32.

        Padding (`valid` [T] is False) gets next to nothing, so that the norm of what experts give out is the tokens';
        not 0 (nor so small that it slows a CPU), because the flex dispatcher finds the chosen experts by their probs.
        """
        factor = 1.0 / self.stage if self.options.group_combine == "mean" else 1.0
        if self.options.router_prob_scaling:
            factor *= self.options.resolved_expert_scale
            # The same reason: none that is chosen may underflow to 0. To any other probability it adds nothing.
            scores = scores + 2 * torch.finfo(torch.float32).tiny / min(factor, 1.0)
            if self.options.renormalize_topk:
                scores = scores / (scores * routing_map).sum(dim=-1, keepdim=True)
        else:
            scores = scores * 0.0 + 1.0  # a zero gradient, not none: DDP waits for every trained parameter
        probs = scores * (routing_map * factor)
        return probs if valid is None else probs.where(valid[:, None, None], routing_map * 2.0**-60)

    def _ask_for_the_base_expert(self, logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Attach the LPR loss, the weighted sum of -log p_0, to the logits, and record it.

        All that its backward pass does is to add d loss / d logits = weight (p - e_0), which is finite at p_0 = 0 too.
        The released code takes the softmax of p once more, q: its loss is -log q_0, and d loss / d p is q - e_0.

        Source: MoE-LPR (arXiv:2408.11396) section 2.3. Deviates: D16 (model/README.md).

        Args:
            logits: [T, 1, n] float32.
            weights: [T] float32, 0 for tokens that do not count.

        Returns:
            `logits`, which carry the loss's gradient.
        """
        log_probs = logits.detach().log_softmax(dim=-1)
        if self.lpr_softmax_twice:
            probs = log_probs.exp()
            log_probs = probs.log_softmax(dim=-1)
        if (tracker := recording_tracker(self)) is not None:
            tracker.record_lpr(self.layer_number, -log_probs[:, 0, 0], weights > 0)
        slopes = log_probs.exp()
        slopes[..., 0] -= 1
        if self.lpr_softmax_twice:
            slopes = probs * (slopes - (probs * slopes).sum(dim=-1, keepdim=True))
        return _AttachAuxLoss.apply(logits, slopes * weights[:, None, None], self.lpr_coeff)

    def _record_and_balance(
        self, scores: torch.Tensor, routing_map: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Attach each group's aux loss n * sum_i f_i P_i to `scores`; record it raw (1 when balanced), and the choices.

        f_i counts choices and has no gradient. So the loss is linear in the scores, and all that its backward pass does
        is to add the constant d loss / d scores = n f_i / T, for all groups at once. It is attached in stage 2 for the
        frozen LM router too: through h it trains MT experts of earlier layers.

        Source: Mix-MoE (arXiv:2605.24681) eq. 8-9. Deviates: D9 (model/README.md).

        Args:
            scores: [T, G, n] float32, the groups' softmax.
            routing_map: [T, G, n] bool.
            valid: [T] bool, False = padding; None: no padding.

        Returns:
            `scores`, which carry the aux losses' gradient.
        """
        tracker, has_aux_loss = recording_tracker(self), self.group_aux_loss_coeff > 0
        if tracker is None and not has_aux_loss:
            return scores
        if valid is not None:
            routing_map = routing_map & valid[:, None, None]
        counts = routing_map.sum(dim=0)
        if tracker is not None:
            tracker.record_routing(self.layer_number, scores.detach(), routing_map, counts)
        if not has_aux_loss:
            return scores
        slopes, num_tokens = self._aux_loss_slopes(counts, len(scores), valid)
        aux_losses = (scores.detach() * slopes).sum(dim=(0, 2))
        record_aux_losses(aux_losses, self.layer_number, self.config.num_layers, self.tp_cp_group)
        if self.calculate_per_token_loss:  # Megatron divides all gradients by the number of tokens
            slopes = slopes * num_tokens
        return _AttachAuxLoss.apply(scores, slopes, self.group_aux_loss_coeff)

    def _aux_loss_slopes(
        self, counts: torch.Tensor, num_local_tokens: int, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Return d raw aux loss / d scores, [G, n] or with padding [T, G, n] float32, and the number of tokens.

        Tokens and `counts`, [G, n] int64, are those of all ranks that share this batch's sequences.
        """
        n, k = self.options.num_experts_per_group, self.options.topk_per_group
        ranks = utils.get_pg_size(self.tp_cp_group)
        if ranks > 1:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        if valid is None:  # the ranks hold as many tokens each: no operation is needed
            num_tokens = max(num_local_tokens * ranks, 1)
            return counts * (n / (k * num_tokens**2)), num_tokens
        valid_tokens = (counts[0].sum() / k).clamp_min(1)  # each token has k choices in a group
        return counts * (n / (k * valid_tokens**2)) * valid[:, None, None], valid_tokens

    def _to_physical_order(self, columns: torch.Tensor) -> torch.Tensor:
        """Reorder experts from logical to physical: [T, G, n] -> [T, E]."""
        if self.ep_size == 1:
            return columns.flatten(1)
        tokens, groups, n = columns.shape
        per_rank = columns.reshape(tokens, groups, self.ep_size, n // self.ep_size).transpose(1, 2)
        return per_rank.reshape(tokens, groups * n)


def _stack(parameters: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    """Put the groups' parameters of one kind below each other; None when the routers have none."""
    present = [parameter for parameter in parameters if parameter is not None]
    return torch.cat(present) if len(present) > 1 else parameters[0]


class _AttachAuxLoss(torch.autograd.Function):
    """Give back `scores`; on the way back add the gradient of a loss of theirs, coeff * Megatron's scale * `slopes`."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, slopes: torch.Tensor, coeff: float) -> torch.Tensor:
        ctx.save_for_backward(slopes)
        ctx.coeff = coeff
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slopes,), scale = ctx.saved_tensors, MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is None:  # Megatron's schedules set it
            return torch.add(grads[0], slopes, alpha=ctx.coeff), None, None
        return torch.addcmul(grads[0], slopes, scale, value=ctx.coeff), None, None


class _RouterLinear(torch.autograd.Function):
    """x W^T + b in float32 that keeps x in its own dtype for the backward pass (half the memory in bf16)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return functional.linear(x.float(), weight, None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, len(weight))
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = (rows @ weight).to(x.dtype).view_as(x) if need_x else None
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1]).float() if need_weight else None
        return grad_x, grad_weight, rows.sum(dim=0).to(ctx.bias_dtype) if need_bias else None
