"""Where a Mix-MoE model sends the tokens of each language: shares per layer, group and expert.

Shape legend: T tokens, G expert groups (LM, MT), n experts per group, k chosen per group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.batches import text_batches
from mixmoe_megatron.evaluation.models import LoadedModel
from mixmoe_megatron.methods.mixmoe import GROUPS


@dataclass(frozen=True)
class GroupRouting:
    """Routing of one text collection in one layer and one expert group.

    Attributes:
        share: Share of the routed (token, slot) pairs that each expert got; n numbers that sum to 1.
        mean_prob: Mean router probability of each expert; n numbers that sum to 1.
        load_balance: The aux loss n * sum_i share_i * mean_prob_i: 1 when balanced, up to n at collapse (eq. 8-9).
        top_prob: Mean of each token's highest router probability: 1/n when undecided, 1 when saturated.
    """

    share: list[float]
    mean_prob: list[float]
    load_balance: float
    top_prob: float


@dataclass(frozen=True)
class Routing:
    """Routing of one text collection.

    Attributes:
        tokens: Tokens seen, padding and the first token's artificial context left out.
        layers: 0-based layer number, as text, to {group name: statistics}.
    """

    tokens: int
    layers: dict[str, dict[str, GroupRouting]]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)


def is_mixmoe(loaded: LoadedModel) -> bool:
    """Tell whether the model has Mix-MoE routers."""
    return getattr(loaded.model.config, "model_type", None) == "mixmoe"


def group_sums(logits: torch.Tensor, num_groups: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum routing over tokens, in each group by itself.

    Args:
        logits: [T, G*n] router logits, LM experts first.
        num_groups: G.
        top_k: k.

    Returns:
        counts: [G, n] float64, how often an expert was chosen. probs: [G, n] float64, summed probabilities.
        top_probs: [G] float64, summed highest probabilities.
    """
    logits = logits.float().unflatten(-1, (num_groups, -1))
    probs = logits.softmax(dim=-1).double()
    chosen = logits.topk(top_k, dim=-1).indices
    counts = torch.zeros_like(probs).scatter_(-1, chosen, 1.0).sum(dim=0)
    return counts, probs.sum(dim=0), probs.amax(dim=-1).sum(dim=0)


def _group_routing(counts: torch.Tensor, probs: torch.Tensor, top_probs: torch.Tensor, tokens: int) -> GroupRouting:
    """Turn one group's sums ([n], [n], scalar) into its statistics."""
    share, mean_prob = counts / counts.sum(), probs / tokens
    return GroupRouting(
        share=share.tolist(),
        mean_prob=mean_prob.tolist(),
        load_balance=(share.shape[0] * (share * mean_prob).sum()).item(),
        top_prob=top_probs.item() / tokens,
    )


@torch.inference_mode()
def measure_routing(loaded: LoadedModel, texts: Sequence[str]) -> Routing:
    """Count where the tokens of some texts go.

    Args:
        loaded: A Mix-MoE model.
        texts: Texts of one language, or prompts of one direction.

    Raises:
        MixMoEError: The model has no Mix-MoE routers, or there is no text.
    """
    if not is_mixmoe(loaded):
        raise MixMoEError(f"System {loaded.name!r} is not a Mix-MoE model: it has no routers to inspect.")
    config, tokens = loaded.model.config, 0
    sums: dict[int, tuple[torch.Tensor, ...]] = {}
    for _, input_ids, mask in text_batches(loaded, texts, "routing"):
        output = loaded.model(
            input_ids=input_ids, attention_mask=mask, use_cache=False, output_router_logits=True, logits_to_keep=1
        )
        mask[:, 0] = 0  # context only: already counted, or no token of the text
        kept = mask.flatten().bool()
        tokens += int(kept.sum())
        for layer, logits in zip(config.moe_layers, output.router_logits, strict=True):
            new = group_sums(logits[kept.to(logits.device)].cpu(), config.stage, config.topk_per_group)
            sums[layer] = tuple(a + b for a, b in zip(sums[layer], new, strict=True)) if layer in sums else new
    layers: dict[str, dict[str, GroupRouting]] = {}
    for layer in config.moe_layers:
        groups = zip(GROUPS[: config.stage], *sums[layer], strict=True)
        layers[str(layer)] = {
            name: _group_routing(counts, probs, top_probs, tokens) for name, counts, probs, top_probs in groups
        }
    return Routing(tokens, layers)


def routing_from_dict(value: dict[str, Any]) -> Routing:
    """Return the Routing whose `to_dict` gave `value`."""
    layers = {
        layer: {name: GroupRouting(**group) for name, group in groups.items()}
        for layer, groups in value["layers"].items()
    }
    return Routing(value["tokens"], layers)


def specialisation(routings: Mapping[str, Routing]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure how far the experts of each layer and group belong to languages (or directions), all weighted alike.

    Args:
        routings: Language to its routing, from one model.

    Returns:
        {layer: {group: measures}}: `mutual_information` between language and expert, bits: 0 when all languages use
        the experts alike, at most log2 of the smaller number of languages and experts. `normalised`: over that most, 0
        to 1. `entropy`: of the experts within a language, mean over languages, bits: 0 when each language uses one
        expert. `mean_entropy`: of the experts over all languages, bits: log2(n) when balanced.
    """
    first = next(iter(routings.values()))

    def measures(layer: str, group: str) -> dict[str, float]:
        shares = torch.tensor([routing.layers[layer][group].share for routing in routings.values()]).double()
        entropy, mean_entropy = _entropy(shares).mean().item(), _entropy(shares.mean(dim=0)).item()
        information, most = max(0.0, mean_entropy - entropy), math.log2(min(shares.shape))
        normalised = information / most if most else 0.0
        return {"mutual_information": information, "normalised": normalised, "entropy": entropy,
                "mean_entropy": mean_entropy}  # fmt: skip

    return {layer: {group: measures(layer, group) for group in groups} for layer, groups in first.layers.items()}


def _entropy(shares: torch.Tensor) -> torch.Tensor:
    """[..., n] shares to [...] bits."""
    return -torch.special.xlogy(shares, shares).sum(dim=-1) / math.log(2)


def language_distance(first: Routing, second: Routing) -> dict[str, dict[str, float]]:
    """Compare two languages' shares: the total variation distance, per layer and group.

    Args:
        first: One language's routing.
        second: Another's, from the same model.

    Returns:
        {layer: {group: distance}}: 0 when both use the experts alike, 1 when they share none.
    """
    return {
        layer: {
            name: sum(abs(a - b) for a, b in zip(group.share, second.layers[layer][name].share, strict=True)) / 2
            for name, group in groups.items()
        }
        for layer, groups in first.layers.items()
    }
