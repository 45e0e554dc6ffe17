"""Where the autograd graph of a phase begins, from its table alone: all that lies before it is frozen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mixmoe_megatron.methods.base import Phase

#: within an MoE layer: module, and what follows a group's name in it
_MOE = (("experts", "_experts"), ("router", ""))


@dataclass(frozen=True)
class GraphStart:
    """Where the autograd graph of a phase begins: all that lies before it in the decoder is frozen.

    Attributes:
        layer: 0-based global number of the first layer that has something to train.
        has_attention: whether its attention, or the norm before that, trains; else its FFN or MoE layer is the first.
    """

    layer: int
    has_attention: bool = False


def graph_start(
    phase: Phase, num_layers: int, moe_layers: Collection[int], new_layers: Collection[int]
) -> GraphStart | None:
    """Return where the graph of a phase begins; None where the embedding trains, so that nothing lies before.

    Args:
        phase: that is trained.
        num_layers: of the whole model.
        moe_layers: 0-based numbers of the MoE layers.
        new_layers: of the layers that the base has not.
    """
    if phase.is_trained("embedding.word_embeddings.weight"):
        return None
    attention = ("input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj",
                 "self_attention.linear_qkv.lora.q_a")  # fmt: skip
    dense = ("mlp.linear_fc1", "mlp.linear_fc2", "pre_mlp_layernorm")
    moe = (*(f"mlp.{kind}.{group}{tail}" for group in phase.groups for kind, tail in _MOE),
           "mlp.shared_experts.linear_fc1", "pre_mlp_layernorm")  # fmt: skip
    for layer in range(num_layers):
        parts = attention, moe if layer in moe_layers else dense
        trained = [
            any(phase.is_trained(f"decoder.layers.{layer}.{name}.weight", new_layers) for name in names)
            for names in parts
        ]
        if any(trained):
            return GraphStart(layer, has_attention=trained[0])
    return GraphStart(num_layers)
