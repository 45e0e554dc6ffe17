"""The Mix-MoE layer: Megatron's MoELayer with the group router and the two expert groups.

Per token, with L the chosen LM experts, M the chosen MT experts, s the expert scale and p the groups' softmax:

    stage 1:  y = sum_L s p E(h)
    stage 2:  y = c (sum_L s p E(h) + sum_M s p E(h)),   c = 1/2 ("mean") or 1 ("sum")

With the option `shared_experts` Megatron's own shared expert S adds S(h) to the y of stage 1.

The groups combine in the router's probs, which carry c s p: one dispatch takes each token to its experts of both
groups, and the dispatcher's sum over a token's experts is y. All else (dispatchers, recomputation, overlap) is
Megatron's.

Source: Mix-MoE (arXiv:2605.24681) section III-A, eq. 1-7. Deviates: D1, D2 (model/README.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from mixmoe_megatron.model.backends import uses_transformer_engine
from mixmoe_megatron.model.config import options_and_stage
from mixmoe_megatron.model.experts import MixMoEExperts
from mixmoe_megatron.model.router import MixMoERouter


class MixMoELayer(MoELayer):
    """A Mix-MoE layer in place of a dense FFN.

    Args:
        config: a MixMoETransformerConfig.
        submodules: the router and the experts; None: Mix-MoE's, and Megatron's own shared expert.
        kwargs: MoELayer's other arguments (layer_number, pg_collection, name ...), passed on to Megatron.

    Raises:
        MixMoEError: the config does not go with Mix-MoE, for one num_experts_per_group is not divisible by the
            expert-parallel size.
    """

    def __init__(self, config: TransformerConfig, submodules: MoESubmodules | None = None, **kwargs: Any):
        _, self.stage = options_and_stage(config)
        submodules = submodules or _submodules(config)
        super().__init__(config, submodules, **kwargs)
        self.needs_input_gradient = _needs_input_gradient(config)
        _sort_once(self.token_dispatcher)

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer, [S, B, H] -> ([S, B, H], no bias).

        Args:
            hidden_states: [S, B, H], the local shard under sequence parallelism.
            intermediate_tensors: Megatron's.
            padding_mask: [B, S]. bool: True where there is padding; None: nowhere. float32: there is none, and these
                are the weights of the tokens in the LPR loss (`router.MixMoERouter.lpr_weights`).
        """
        if padding_mask is not None and padding_mask.is_floating_point():  # Megatron would make it boolean
            self.router.lpr_weights, padding_mask = padding_mask.t().reshape(-1), None
        try:
            return self._run(hidden_states, intermediate_tensors, padding_mask)
        finally:
            self.router.lpr_weights = None

    def _run(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.needs_input_gradient and torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()
        return super().forward(hidden_states, intermediate_tensors, padding_mask)

    def set_layer_number(self, layer_number: int) -> None:
        """Set the 1-based number of the layer, which is told when it is known."""
        super().set_layer_number(layer_number)
        self.experts.layer_number = layer_number

    @torch.no_grad()
    def initialize_mt_from_lm(self) -> None:
        """Start the MT group as a copy of the LM group: experts always, the router unless mt_router_init is "random".

        With the group combination "mean", stage 2 then begins exactly where stage 1 ended.

        Source: Mix-MoE (arXiv:2605.24681) section III-A, MT Experts. Deviates: D6 (model/README.md).
        """
        assert self.stage == 2, "only stage 2 has an MT group"
        pairs = [(self.experts.lm_experts, self.experts.mt_experts)]
        if self.router.options.mt_router_init == "copy":
            pairs.append((self.router.lm, self.router.mt))
        for source, target in pairs:
            for (name, lm), (mt_name, mt) in zip(source.named_parameters(), target.named_parameters(), strict=True):
                assert name == mt_name
                mt.copy_(lm)


def _submodules(config: TransformerConfig) -> MoESubmodules:
    stock = get_moe_module_spec(uses_transformer_engine(config), config.num_moe_experts)
    return replace(stock.keywords["submodules"], experts=MixMoEExperts, router=MixMoERouter)


def _sort_once(dispatcher: MoETokenDispatcher) -> None:
    """Spare a rank that holds all experts the second of the all-to-all dispatcher's permutations, each way.

    It brings what several ranks sent into the experts' order, in which one rank's own tokens are already: it would copy
    them all, forward and backward. Megatron leaves it out for one expert, and asks for that number for nothing else.
    """
    if isinstance(dispatcher, MoEAlltoAllTokenDispatcher) and dispatcher.ep_size == dispatcher.tp_size == 1:
        dispatcher.num_local_experts = 1


def _needs_input_gradient(config: TransformerConfig) -> bool:
    """Whether the layer's own gradients hang on that of its input, which the first MoE layer, above frozen ones, lacks.

    Asking for it costs that layer the gradient of its input, which nothing below uses.
    """
    # A checkpoint runs its backward pass only when one of its inputs wants a gradient.
    recomputes = config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or [])
    # Transformer Engine up to 2.14 permutes the gradient of the probs only where it permutes that of the tokens.
    return recomputes or config.moe_permute_fusion
