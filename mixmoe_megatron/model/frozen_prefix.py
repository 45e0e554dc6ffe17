"""Run the frozen layers below the first trained one ahead of the block, without an autograd graph.

In Mix-MoE's stages the embedding, every layer below the first MoE layer and that layer's own attention are frozen and
nothing trained lies below them: they need no graph, no stored activations and no recomputation. So it is with the
layers below the first new one of LLaMA-Pro, which trains its attention too. And a trap waits there.
Under full activation recomputation Megatron wraps layers in checkpoints; a checkpoint whose input does not require grad
(frozen embedding) gives an output that does not either, the loss then has no graph, and Megatron's `backward_step`
skips the backward pass without a word: the model never trains.

Both are answered by one pair of hooks on the decoder block and a layer class with three modes:

- before the block runs, its hook runs the layers below the first trained one under `no_grad`, once, outside any
  checkpoint; inside the block these layers pass their input through (so layer indices, names and recomputation chunks
  stay Megatron's, for `uniform` and `block` alike);
- under full recomputation the hook makes the block's input require grad, so that every checkpoint is recorded;
- the first trained layer, where its attention is frozen, runs that under `no_grad` and starts the graph at its FFN or
  MoE layer.

Each pipeline stage (and virtual stage) decides by its own layers' global numbers. A later stage that holds layers below
the first trained one owes the stage before it a gradient: it is zero, and the hook after the block sends zeros without
computing anything. Layers above the first trained one are untouched: gradients must pass through them.

With fp8 or fp4 or CPU offloading, whose contexts belong to the block, no layer is run ahead; there the hook only makes
the input require grad.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import WrappedTensor, get_attr_wrapped_model, make_viewless_tensor

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.model.graph_start import GraphStart, graph_start

_LAYER_ARGUMENTS = tuple(
    name for name in inspect.signature(TransformerLayer._forward_attention).parameters if name != "self"
)


class MixMoETransformerLayer(TransformerLayer):
    """Megatron's TransformerLayer, which can leave frozen work out of the autograd graph.

    Attributes:
        mode: "normal": as Megatron's. "ahead": all frozen, nothing trained below; `run_ahead` did its work, `forward`
            passes the input through. "first": the first trained layer, trained above its attention alone, which runs
            under no_grad.
    """

    mode = "normal"

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer, [S, B, H] -> ([S, B, H], context); in mode "ahead" return the input."""
        if self.mode == "ahead":
            return kwargs["hidden_states"], kwargs.get("context")
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def run_ahead(self, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer without a graph, [S, B, H] -> ([S, B, H], context)."""
        kwargs["hidden_states"] = kwargs["hidden_states"].detach()
        return super().forward(**kwargs)

    def _forward_attention(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.mode != "first" or not torch.is_grad_enabled():
            return super()._forward_attention(hidden_states, *args, **kwargs)
        with torch.no_grad():
            return super()._forward_attention(hidden_states.detach(), *args, **kwargs)


def run_frozen_layers_ahead(chunks: list[torch.nn.Module], phase: Phase) -> None:
    """Run what is frozen below the first trained layer ahead of each chunk's block.

    Where the embedding trains all runs as Megatron has it. Call it where the model is built, beside
    `freezing.freeze_parameters`.

    Args:
        chunks: this rank's GPTModels, built from this package's specs, wrapped or not.
        phase: to train; each model has something that it trains, on some pipeline stage.

    Raises:
        MixMoEError: a model was not built from this package's layer specs.
    """
    for chunk in chunks:
        decoder = get_attr_wrapped_model(chunk, "decoder")
        # Counted over the whole model: the first trained layer may lie on another pipeline stage.
        frequency = decoder.config.moe_layer_freq if phase.groups else []
        moe_layers = {layer for layer, is_moe in enumerate(frequency) if is_moe}
        new_layers = getattr(decoder.config, "new_layers", ())
        set_frozen_prefix(decoder, graph_start(phase, decoder.config.num_layers, moe_layers, new_layers))


def set_frozen_prefix(decoder: TransformerBlock, start: GraphStart | None) -> None:
    """Set the layers' modes and put the hooks on the decoder block; a second call replaces the first.

    Args:
        decoder: a GPTModel's block (one pipeline or virtual stage).
        start: where the graph begins; None: all is trained, take the hooks off.

    Raises:
        MixMoEError: the block was not built from this package's layer specs.
    """
    for handle in getattr(decoder, "_mixmoe_hooks", ()):
        handle.remove()
    decoder._mixmoe_hooks = []
    config = decoder.config
    has_contexts = config.fp8 or config.fp4 or config.cpu_offloading  # these belong to the block
    boundary = -1 if start is None or has_contexts else start.layer
    for layer in decoder.layers:
        if not isinstance(layer, MixMoETransformerLayer):
            raise MixMoEError(
                "the model's layers do not come from mixmoe_megatron.model.layer_specs: build it from there."
            )
        index = layer.layer_number - 1
        is_first = start is not None and index == boundary and not start.has_attention
        layer.mode = "ahead" if index < boundary else "first" if is_first else "normal"
    if start is not None:
        decoder._mixmoe_hooks = [
            decoder.register_forward_pre_hook(_before_block, with_kwargs=True),
            decoder.register_forward_hook(_after_block),
        ]


def _before_block(decoder: TransformerBlock, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Run the layers of mode "ahead"; under full recomputation make the block's input require grad."""
    bound = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
    if bound.get("extract_layer_indices"):
        raise MixMoEError("extract_layer_indices is not supported while frozen layers run ahead of the block.")
    hidden_states = bound["hidden_states"] if decoder.pre_process else decoder.input_tensor
    if isinstance(hidden_states, WrappedTensor):
        hidden_states = hidden_states.unwrap()
    decoder._mixmoe_received = None
    if any(layer.mode != "normal" for layer in decoder.layers):  # nothing trained lies below this stage's first layer
        if torch.is_grad_enabled() and not decoder.pre_process:
            decoder._mixmoe_received = hidden_states
        hidden_states = _run_ahead(decoder, hidden_states, bound)
    recomputes = decoder.config.recompute_granularity == "full" and decoder.training and torch.is_grad_enabled()
    if recomputes and not hidden_states.requires_grad and any(layer.mode != "ahead" for layer in decoder.layers):
        hidden_states = hidden_states.detach().requires_grad_()
    if decoder.pre_process:
        bound["hidden_states"] = hidden_states
    else:
        decoder.input_tensor = hidden_states
    return (), bound


def _run_ahead(decoder: TransformerBlock, hidden_states: torch.Tensor, bound: dict[str, Any]) -> torch.Tensor:
    arguments = {name: bound[name] for name in _LAYER_ARGUMENTS if bound.get(name) is not None}
    arguments.setdefault("attention_mask", None)
    hidden_states, context = hidden_states.detach(), bound.get("context")
    parallel = decoder.config.sequence_parallel
    with tensor_parallel.get_cuda_rng_tracker().fork() if parallel else nullcontext():  # as the block does
        for layer in decoder.layers:
            if layer.mode == "ahead":
                arguments.update(hidden_states=hidden_states, context=context)
                hidden_states, context = layer.run_ahead(**arguments)
    return hidden_states


def _after_block(decoder: TransformerBlock, args: tuple, output: Any) -> Any:
    """Give the stage before this one its zero gradient, and the one after it a tensor that is no view.

    Pipeline schedules free the output's data, and a checkpoint whose layers pass their input through returns a view.
    """
    received, decoder._mixmoe_received = decoder._mixmoe_received, None
    if received is not None and received.requires_grad:
        output = _ZeroGradient.apply(output, received)
    return make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True)


class _ZeroGradient(torch.autograd.Function):
    """The first input; its gradient goes on, the second input gets zeros."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        ctx.like = received.shape, received.dtype, received.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype, device = ctx.like
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)
