"""Compute a tensor a second time in the backward pass instead of keeping it (`--recompute-modules moe_act`).

The experts' activation is the largest tensor of a Mix-MoE layer, and cheap to compute again from fc1's output, which
the graph keeps anyway:

    forward    gate_up -> make() -> activation -> use() -> output
                                        |
                 autograd saves it for the gradient of fc2's weight
                                        |
                 pack: the activation -> (size, stride, offset)       its memory is free after the forward pass
                       anything else  -> itself

    backward   unpack: (size, stride, offset) -> make() again, once, and the same view of what it gives

Megatron's CheckpointWithoutOutput does the same, but compiles C++ at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def recomputed(make: Callable[[], torch.Tensor], use: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return use(make()), without keeping what `make` gives for the backward pass.

    Args:
        make: gives a tensor of any shape and dtype, the same at each call; it is called again in the backward pass.
        use: computes with that tensor; what autograd saves of it, views included, is not kept.

    Returns:
        The result of `use`, with the gradients of an ordinary call.
    """
    made = make()
    storage = made.untyped_storage().data_ptr()
    again: list[torch.Tensor] = []

    def pack(saved: torch.Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        return saved.size(), saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if torch.is_tensor(packed):
            return packed
        if not again:
            with torch.no_grad():
                again.append(make())
        return again[0].as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return use(made)
