"""What the FFNs of a dense model are worth on some text: each layer's, and each neuron's in it.

A Mix-MoE layer computes a part of an FFN for each token. It costs least in the layers whose FFN is missed least, and
with the neurons that do most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mixmoe_megatron.evaluation.models import LoadedModel
from mixmoe_megatron.evaluation.perplexity import Perplexity, measure_perplexity

#: Tokens of each file that are enough: the order of the layers' costs is settled by then.
ENOUGH_TOKENS = 1024
MAX_WINDOW = 256  # tokens of a sequence
#: Of a file, to find them in: a corpus of any size may be named.
ENOUGH_BYTES = 64 * ENOUGH_TOKENS


@dataclass(frozen=True)
class FFNCosts:
    """What a dense model's FFNs are worth.

    Attributes:
        dense: the model's own perplexity on each text.
        without: by layer, the perplexity without its FFN on each text.
        importance: by layer, [F] float64: mean absolute activation of each neuron times the length of its column of
            the down projection, as a share of the layer's sum, averaged over the texts.
    """

    dense: dict[str, Perplexity]
    without: list[dict[str, Perplexity]]
    importance: list[np.ndarray[Any, Any]]

    def factor(self, layer: int) -> float:
        """Return by what a layer's FFN, left out, multiplies the perplexity: the geometric mean over the texts."""
        return mean_factor(self.without[layer], self.dense)

    def factors(self) -> list[float]:
        """Return `factor` of every layer."""
        return [self.factor(layer) for layer in range(len(self.without))]

    def cheapest_layers(self, count: int) -> list[int]:
        """Return the layers, in order, whose FFN is missed least."""
        return sorted(sorted(range(len(self.without)), key=self.factor)[:count])


def mean_factor(found: Mapping[str, Perplexity], dense: Mapping[str, Perplexity]) -> float:
    """Return how many times the dense model's perplexity a model has: the geometric mean over the texts."""
    return float(np.exp(np.mean([found[name].loss - dense[name].loss for name in dense])))


def enough_texts(loaded: LoadedModel, texts: Sequence[str]) -> list[str]:
    """Return the first texts that hold ENOUGH_TOKENS together; all where there are fewer."""
    chosen: list[str] = []
    tokens = 0
    for text in texts:
        if tokens >= ENOUGH_TOKENS:
            break
        chosen.append(text)
        tokens += len(loaded.tokenizer.encode([text], add_special_tokens=False)[0])
    return chosen


def measure_each(
    loaded: LoadedModel, texts: Mapping[str, Sequence[str]], tokens_per_batch: int = ENOUGH_TOKENS
) -> dict[str, Perplexity]:
    """Return a model's perplexity on each text, by name; with one token a batch nothing is padded."""
    return {
        name: measure_perplexity(loaded, lines, max_window=MAX_WINDOW, tokens_per_batch=tokens_per_batch)
        for name, lines in texts.items()
    }


def measure_ffn_costs(loaded: LoadedModel, texts: Mapping[str, Sequence[str]]) -> FFNCosts:
    """Measure a dense model of the Llama or Qwen2 family: one pass for its neurons and one for each layer.

    Args:
        loaded: the model.
        texts: lines of text by name; all of them are read for each layer (see `enough_texts`).
    """
    layers = loaded.model.model.layers
    activity: dict[str, list[np.ndarray[Any, Any]]] = {}
    dense: dict[str, Perplexity] = {}
    for name, lines in texts.items():
        with _recorded_activity(layers) as sums:
            dense |= measure_each(loaded, {name: lines}, tokens_per_batch=1)
        activity[name] = [(total / total.sum()).numpy() for total in sums]
    without = []
    for number, layer in enumerate(layers):
        named = replace(loaded, name=f"{loaded.name} without FFN {number} of {len(layers)}")
        hook = layer.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        try:
            without.append(measure_each(named, texts))
        finally:
            hook.remove()
    importance = [np.mean(of_texts, axis=0) for of_texts in zip(*activity.values(), strict=True)]
    return FFNCosts(dense, without, importance)


@contextmanager
def _recorded_activity(layers: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """Add up, for each layer, what each neuron gives: [F] float64, sum of |activation| times its column's length."""
    sums = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64) for layer in layers]
    lengths = [layer.mlp.down_proj.weight.detach().norm(dim=0, dtype=torch.float32) for layer in layers]

    def add(number: int, inputs: tuple[torch.Tensor, ...]) -> None:
        total = inputs[0].detach().float().abs().flatten(0, -2).sum(dim=0) * lengths[number]
        sums[number] += total.double().cpu()

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs, number=number: add(number, inputs))
        for number, layer in enumerate(layers)
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
