"""What the FFNs of a dense model are worth on some text, and what best stands in for them.

A Mix-MoE layer computes a part of an FFN for each token. It costs least in the layers whose FFN is missed least, with
the neurons that do most, and with a down projection that makes up for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mixmoe_megatron.evaluation.models import LoadedModel
from mixmoe_megatron.evaluation.perplexity import Perplexity, measure_perplexity
from mixmoe_megatron.evaluation.progress import Progress

Array = np.ndarray[Any, Any]
Texts = Mapping[str, Sequence[str]]

#: Tokens of each file that are enough to measure a model: the order of the layers' costs is settled by then.
MEASURED_TOKENS = 1024
#: Tokens of each file that are enough to choose neurons and to fit down projections.
FITTED_TOKENS = 4096
MAX_WINDOW = 256  # tokens of a sequence
#: Of a file, to find them in: a corpus of any size may be named.
ENOUGH_BYTES = 128 * 1024
#: Of the least squares: how much a neuron's column is held to what it was, as a share of the neuron's own energy.
RIDGE = 0.3


@dataclass(frozen=True)
class FFNCosts:
    """What a dense model's FFNs are worth.

    Attributes:
        dense: the model's own perplexity on each text.
        without: by layer, the perplexity without its FFN on each text.
    """

    dense: dict[str, Perplexity]
    without: list[dict[str, Perplexity]]

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


def split_text(loaded: LoadedModel, lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return lines to measure a model on, MEASURED_TOKENS of them, and others to fit it to, FITTED_TOKENS.

    Every fourth line goes to the former while they lack tokens, so that the lines of a short text are shared out too.
    """
    measured: list[str] = []
    fitted: list[str] = []
    missing_measured, missing_fitted = MEASURED_TOKENS, FITTED_TOKENS
    for number, line in enumerate(lines):
        tokens = len(loaded.tokenizer.encode([line], add_special_tokens=False)[0])
        if missing_measured > 0 and (number % 4 == 0 or missing_fitted <= 0):
            measured.append(line)
            missing_measured -= tokens
        elif missing_fitted > 0:
            fitted.append(line)
            missing_fitted -= tokens
        else:
            break
    return measured, fitted


def measure_each(loaded: LoadedModel, texts: Texts) -> dict[str, Perplexity]:
    """Return a model's perplexity on each text, by name."""
    return {
        name: measure_perplexity(loaded, lines, max_window=MAX_WINDOW, tokens_per_batch=MEASURED_TOKENS)
        for name, lines in texts.items()
    }


def measure_ffn_costs(loaded: LoadedModel, texts: Texts) -> FFNCosts:
    """Measure a dense model of the Llama or Qwen2 family without each of its FFNs.

    What the layers below one give is kept, [tokens, H] in the model's dtype for each layer, and not computed again.

    Args:
        loaded: the model.
        texts: lines of text by name; all of them are read for each layer (see `split_text`).
    """
    decoder = loaded.model.model
    layers = decoder.layers
    inputs: list[list[torch.Tensor]] = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0]))
        for layer, kept in zip(layers, inputs, strict=True)
    ]
    try:
        dense = measure_each(loaded, texts)
    finally:
        for hook in hooks:
            hook.remove()
    without: list[dict[str, Perplexity]] = []
    count = len(layers)
    with Progress("the model without each of its FFNs", count, work=count * (count + 1) / 2, unit="FFNs") as progress:
        for number, layer in enumerate(layers):
            named = replace(loaded, name=f"{loaded.name} without FFN {number} of {count}")
            hook = layer.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
            decoder.layers = torch.nn.ModuleList([_Kept(inputs[number], layer), *layers[number:]])
            try:
                without.append(measure_each(named, texts))
            finally:
                hook.remove()
                decoder.layers = layers
            progress.advance(1, count - number, sum(found.tokens for found in without[-1].values()))
    return FFNCosts(dense, without)


class _Kept(torch.nn.Module):
    """In the place of a model's lower layers: gives what they gave, batch after batch."""

    def __init__(self, outputs: list[torch.Tensor], layer: torch.nn.Module) -> None:
        super().__init__()
        self._outputs = iter(outputs)
        self.attention_type = getattr(layer, "attention_type", None)  # Qwen2 asks each layer for the mask it wants

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return next(self._outputs)


def measure_importance(loaded: LoadedModel, texts: Texts) -> list[Array]:
    """Return, by layer, what each neuron gives on some text, as a share of the layer's sum, averaged over the texts.

    That is its mean absolute activation times the length of its column of the down projection.

    Args:
        loaded: a dense model of the Llama or Qwen2 family.
        texts: lines of text by name.

    Returns:
        [F] float64 for each layer.
    """
    projections = [layer.mlp.down_proj for layer in loaded.model.model.layers]
    lengths = [projection.weight.detach().norm(dim=0, dtype=torch.float32) for projection in projections]
    shares: list[Array] = [np.zeros(len(length)) for length in lengths]
    for name, lines in texts.items():
        sums = [torch.zeros(len(length), dtype=torch.float64) for length in lengths]

        def add(number: int, activations: torch.Tensor, output: torch.Tensor, sums: Any = sums) -> None:
            sums[number] += (activations.abs().sum(dim=0) * lengths[number]).double().cpu()

        with _observed(loaded.model, projections, add):
            measure_each(replace(loaded, name=f"{loaded.name} (neurons)"), {name: lines})
        for share, total in zip(shares, sums, strict=True):
            share += (total / total.sum()).numpy() / len(texts)
    return shares


def fit_down_projections(
    loaded: LoadedModel, texts: Texts, neurons: Mapping[int, Array], num_experts: int
) -> dict[int, Array]:
    """Return down projections with which an expert, alone, best gives what the whole FFN gives on some text.

    For an expert with the activations A [T, F'] of its neurons and its columns W [H, F'] of the down projection, the
    outputs Y [T, H] of the FFN leave R = Y - A W^T. The columns become W + D with
    D^T = (A^T A + RIDGE diag(A^T A))^-1 A^T R: least squares, held to W where the text tells little.

    Args:
        loaded: a dense model of the Llama or Qwen2 family.
        texts: lines of text by name.
        neurons: by layer, [F] integers: `slice` cuts them into the experts' neurons.
        num_experts: n.

    Returns:
        By layer, [H, F] float32: the columns in the order of `neurons`.
    """
    layers = list(neurons)
    projections = [loaded.model.model.layers[layer].mlp.down_proj for layer in layers]
    device = projections[0].weight.device
    experts = [torch.from_numpy(neurons[layer].reshape(num_experts, -1)).to(device) for layer in layers]
    columns = [
        projection.weight.detach().float().t()[chosen] for projection, chosen in zip(projections, experts, strict=True)
    ]
    grams = [torch.zeros(*chosen.shape, chosen.shape[1], device=device) for chosen in experts]  # [n, F', F']
    rests = [torch.zeros_like(column) for column in columns]  # [n, F', H]

    def add(number: int, activations: torch.Tensor, output: torch.Tensor) -> None:
        chosen = activations[:, experts[number]].movedim(0, 1)  # [n, T, F']
        grams[number] += chosen.mT @ chosen
        rests[number] += chosen.mT @ (output - chosen @ columns[number])

    with _observed(loaded.model, projections, add):
        measure_each(replace(loaded, name=f"{loaded.name} (least squares)"), texts)
    for gram, rest, column in zip(grams, rests, columns, strict=True):
        energy = gram.diagonal(dim1=-2, dim2=-1)
        energy.mul_(1 + RIDGE).add_(torch.finfo(torch.float32).eps * energy.amax(dim=-1, keepdim=True).clamp_min(1e-30))
        column += torch.cholesky_solve(rest, torch.linalg.cholesky(gram))
    return {layer: column.flatten(0, 1).t().cpu().numpy() for layer, column in zip(layers, columns, strict=True)}


@contextmanager
def _observed(
    model: torch.nn.Module,
    projections: Sequence[torch.nn.Module],
    see: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """Have `see(number, inputs, outputs)` look at what a model's tokens, T in a batch, are to some linear layers of it.

    Inputs are [T, in] and outputs [T, out], float32; what is padding is left out.
    """
    tokens = torch.empty(0)  # of the batch: which places hold one

    def remember(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        tokens = kwargs["attention_mask"].flatten().bool()

    def look(number: int, inputs: torch.Tensor, output: torch.Tensor) -> None:
        see(number, *(x.detach().flatten(0, -2)[tokens].float() for x in (inputs, output)))

    hooks = [model.register_forward_pre_hook(remember, with_kwargs=True)]
    hooks += [
        projection.register_forward_hook(lambda module, inputs, output, number=number: look(number, inputs[0], output))
        for number, projection in enumerate(projections)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
