"""Floating-point operations of one training step, dense (stage 0) or Mix-MoE (stages 1 and 2). Pure arithmetic.

Counted are the matrix products: projections, attention, FFNs, experts, routers and the output layer; a multiplication
and an addition are two operations. Not counted: norms, activations, softmax, embedding lookups, the loss, the fold of
the router weights, the optimizer, and whatever activation recomputation computes twice.

What is frozen saves work (`frozen_prefix.py`): no gradient goes below the first MoE layer, and only trained experts and
routers get a weight gradient. Two small products of the frozen LM group are counted although nothing needs them,
because the groups share one tensor of probabilities and one router product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixmoe_megatron.model.mapping import Sizes

# NVIDIA's data sheets: dense bfloat16 or float16, 10^12 operations a second. The first name found in a device's counts.
_PEAK_TFLOPS = (("A100", 312.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("H200", 989.0))


def peak_flops(device_name: str) -> float | None:
    """Return the peak of a GPU in bfloat16 or float16, operations a second; None for one that is not known here.

    Args:
        device_name: as torch.cuda.get_device_name() tells it.
    """
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS if name in device_name), None)


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training step of the whole model, all ranks together.

    Attributes:
        forward: operations of the forward pass.
        backward_inputs: operations for the gradients of activations.
        backward_weights: operations for the gradients of weights.
    """

    forward: float = 0.0
    backward_inputs: float = 0.0
    backward_weights: float = 0.0

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.forward + self.backward_inputs + self.backward_weights


def _product(forward: float, inputs: int, weights: int) -> StepFlops:
    """Return the operations of a matrix product, or of several of one kind.

    Args:
        forward: operations of the forward pass.
        inputs: how many times as many the gradients of its inputs cost (attention has two inputs), 0: not computed.
        weights: how many times as many the gradient of its weight costs: 1 when it trains, else 0.
    """
    return StepFlops(forward, forward * inputs, forward * weights)


def step_flops(
    sizes: Sizes, topk_per_group: int, tokens: float, seq_length: float, layers: range | None = None
) -> StepFlops:
    """Count the operations of one training step.

    Args:
        sizes: the model's sizes (`sizes.model_sizes`); num_groups 0, 1 or 2 is the stage.
        topk_per_group: k, experts chosen per token and group.
        tokens: tokens of the step, all data-parallel ranks together.
        seq_length: tokens that attend to each other, causally. For sequences of lengths l: sum(l^2) / sum(l).
        layers: only these layers (a pipeline stage); the output layer goes with the last one. None: the whole model.
    """
    layers = range(sizes.num_layers) if layers is None else layers
    products = [astuple(product) for product in _products(sizes, topk_per_group, seq_length, layers)]
    return StepFlops(*(tokens * sum(column) for column in zip(*products, strict=True)))


def _products(sizes: Sizes, topk_per_group: int, seq_length: float, layers: range) -> Iterator[StepFlops]:
    """Yield the products of these layers, operations for one token."""
    dense = sizes.num_groups == 0
    hidden, query = sizes.hidden_size, sizes.num_attention_heads * sizes.kv_channels
    key_value = 2 * sizes.num_query_groups * sizes.kv_channels
    first = -1 if dense else sizes.moe_layers[0]
    for layer in layers:
        above = int(layer > first)
        yield _product(2 * hidden * (query + key_value) + 2 * query * hidden, above, int(dense))
        yield _product(2 * query * (seq_length + 1), 2 * above, 0)  # q k^T and its product with v; half is masked
        if layer in sizes.moe_layers:
            yield from _moe_layer(sizes, topk_per_group, above)
        else:
            yield _product(6 * hidden * sizes.ffn_hidden_size, above, int(dense))
    if layers.stop == sizes.num_layers:
        yield _product(2 * hidden * sizes.padded_vocab_size, 1, int(dense))


def _moe_layer(sizes: Sizes, topk_per_group: int, above: int) -> Iterator[StepFlops]:
    """Yield the products of a Mix-MoE layer; `above`: 1 if a trained layer lies below it, else 0."""
    hidden, groups = sizes.hidden_size, sizes.num_groups
    yield _product(2 * hidden * sizes.num_experts_per_group * groups, above, 1)
    for group in range(groups):
        trained = int(group == groups - 1)
        rows = topk_per_group * hidden * sizes.moe_ffn_hidden_size
        yield _product(4 * rows, above, trained)  # gate and up
        yield _product(2 * rows, 1, trained)  # down
