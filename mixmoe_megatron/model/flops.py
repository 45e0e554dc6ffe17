"""Floating-point operations of one training step, in any phase of any method. Pure arithmetic.

Counted are the matrix products: projections, attention, FFNs, experts, routers and the output layer; a multiplication
and an addition are two operations. Not counted: norms, activations, softmax, embedding lookups, the loss, the fold of
the router weights, the optimizer, and whatever activation recomputation computes twice.

What is frozen saves work (`frozen_prefix.py`): no gradient goes below the first trained weight, and only trained
weights get a gradient. Two small products of the frozen LM group are counted although nothing needs them, because the
groups share one tensor of probabilities and one router product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from mixmoe_megatron.methods.mixmoe import GROUPS

if TYPE_CHECKING:
    from mixmoe_megatron.methods.base import Phase
    from mixmoe_megatron.model.mapping import Sizes

_EXPERT_LINEARS = ("linear_fc1", "linear_fc2")
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


def _product(forward: float, inputs: int | bool, weights: float) -> StepFlops:
    """Return the operations of a matrix product, or of several of one kind.

    Args:
        forward: operations of the forward pass.
        inputs: how many times as many the gradients of its inputs cost (attention has two inputs), 0: not computed.
        weights: whether its weight trains, or which share of it; its gradient costs as many again.
    """
    return StepFlops(forward, forward * inputs, forward * weights)


def step_flops(
    sizes: Sizes,
    phase: Phase,
    topk_per_group: int,
    tokens: float,
    seq_length: float,
    layers: range | None = None,
    loss_share: float = 1.0,
) -> StepFlops:
    """Count the operations of one training step.

    Args:
        sizes: the model's sizes (`sizes.model_sizes`).
        phase: that is trained, which tells what is frozen.
        topk_per_group: k, experts chosen per token and group.
        tokens: tokens of the step, all data-parallel ranks together.
        seq_length: tokens that attend to each other, causally. For sequences of lengths l: sum(l^2) / sum(l).
        layers: only these layers (a pipeline stage); the output layer goes with the last one. None: the whole model.
        loss_share: of the tokens, those that carry loss: others have no logits (`loss_rows.py`).
    """
    layers = range(sizes.num_layers) if layers is None else layers
    products = [astuple(product) for product in _products(sizes, phase, topk_per_group, seq_length, layers, loss_share)]
    return StepFlops(*(tokens * sum(column) for column in zip(*products, strict=True)))


def _products(
    sizes: Sizes, phase: Phase, topk_per_group: int, seq_length: float, layers: range, loss_share: float
) -> Iterator[StepFlops]:
    """Yield the products of these layers, operations for one token."""

    def trains(name: str) -> bool:
        return phase.is_trained(name, sizes.new_layers)

    hidden, query = sizes.hidden_size, sizes.num_attention_heads * sizes.kv_channels
    key_value = 2 * sizes.num_query_groups * sizes.kv_channels
    has_adapters = sizes.lora_rank > 0
    below = trains("embedding.word_embeddings.weight")  # whether something below trains, so that gradients must pass
    for layer in range(layers.stop):
        at = f"decoder.layers.{layer}."
        products = []
        below |= trains(at + "self_attention.linear_qkv.layer_norm_weight")
        qkv, proj = (trains(f"{at}self_attention.{name}.weight") for name in ("linear_qkv", "linear_proj"))
        products.append(_product(2 * hidden * (query + key_value), below, qkv))
        products += _adapters(sizes, below, (hidden, query), (hidden, key_value // 2), (hidden, key_value // 2))
        below |= qkv or has_adapters
        products.append(_product(2 * query * (seq_length + 1), 2 * below, False))  # two products; half is masked
        products.append(_product(2 * query * hidden, below, proj))
        products += _adapters(sizes, below, (query, hidden))
        norm = "pre_mlp_layernorm.weight" if layer in sizes.moe_layers else "mlp.linear_fc1.layer_norm_weight"
        below |= proj | trains(at + norm)
        if layer in sizes.moe_layers:
            products += _moe_layer(sizes, topk_per_group, below, at, trains)
            below |= any(product.backward_weights for product in products)
        else:
            width = sizes.ffn_hidden_size
            fc1, fc2 = (trains(f"{at}mlp.{name}.weight") for name in ("linear_fc1", "linear_fc2"))
            products.append(_product(4 * hidden * width, below, fc1))
            products += _adapters(sizes, below, (hidden, width), (hidden, width))
            below |= fc1 or has_adapters
            products.append(_product(2 * hidden * width, below, fc2))
            products += _adapters(sizes, below, (width, hidden))
            below |= fc2
        if layer in layers:
            yield from products
    if layers.stop == sizes.num_layers:
        below |= trains("decoder.final_layernorm.weight")
        output = "embedding.word_embeddings.weight" if sizes.tied else "output_layer.weight"
        yield _product(2 * hidden * sizes.padded_vocab_size * loss_share, below, trains(output))


def _adapters(sizes: Sizes, below: bool, *layers: tuple[int, int]) -> Iterator[StepFlops]:
    """Yield the products of LoRA, which trains, beside linear layers of these input and output sizes."""
    for inputs, outputs in layers if sizes.lora_rank else ():
        yield _product(2 * sizes.lora_rank * inputs, below, True)
        yield _product(2 * sizes.lora_rank * outputs, True, True)


def _moe_layer(
    sizes: Sizes, topk_per_group: int, below: bool, at: str, trains: Callable[[str], bool]
) -> Iterator[StepFlops]:
    """Yield the products of a Mix-MoE layer; `below`: whether something below it trains; `at`: its name."""
    hidden, groups = sizes.hidden_size, GROUPS[: sizes.num_groups]
    routers = [trains(f"{at}mlp.router.{group}.weight") for group in groups]
    # all groups share one product, and its gradient is computed whole
    yield _product(2 * hidden * sizes.num_experts_per_group * len(groups), below, any(routers))
    if width := sizes.shared_ffn_hidden_size:
        fc1, fc2 = (trains(f"{at}mlp.shared_experts.{name}.weight") for name in _EXPERT_LINEARS)
        yield _product(4 * hidden * width, below, fc1)
        yield _product(2 * hidden * width, below or fc1, fc2)
    for block, experts in sizes.blocks().items():
        fc1, fc2 = (trains(f"{at}mlp.experts.{block}.experts.{name}.weight") for name in _EXPERT_LINEARS)
        share = experts / sizes.num_experts_per_group  # of the group's tokens
        rows = share * topk_per_group * hidden * sizes.moe_ffn_hidden_size
        yield _product(4 * rows, below, fc1)  # gate and up
        yield _product(2 * rows, True, fc2)  # down
