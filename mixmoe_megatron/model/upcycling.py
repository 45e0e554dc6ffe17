"""Upcycling: where the tensors of a Mix-MoE layer come from. Pure functions of torch tensors or numpy arrays.

Source: Mix-MoE (arXiv:2605.24681) section III-A: the LM experts are slices of the dense FFN. Deviates: D5
(model/README.md). Sizes come as arguments; nothing here knows Megatron or Hugging Face. The cuts only move values:
conversions run them on the numbers of slices, as numpy arrays, and no torch is imported for that.

Shapes: H hidden_size, F ffn_hidden_size, n experts per group, F' = moe_ffn_hidden_size (F / n for `slice`, F for
`copy`). A gated FFN is packed the Megatron way: F gate rows, then F up rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mixmoe_megatron.errors import MixMoEError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXPERT_INITS = ("slice", "copy")
Array = Any  # torch.Tensor or numpy.ndarray


def library(array: Array) -> ModuleType:
    """Return the library that an array is of, torch or numpy."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Join arrays of one library along an axis, on which alone their shapes differ."""
    return library(arrays[0]).concatenate(arrays, axis)


def expert_ffn_hidden_size(ffn_hidden_size: int, num_experts: int, expert_init: str) -> int:
    """Return F', the inner size of one expert.

    Args:
        ffn_hidden_size: F of the dense FFN.
        num_experts: n, experts per group.
        expert_init: `slice` (F' = F / n) or `copy` (F' = F).

    Raises:
        MixMoEError: F is not divisible by n, or expert_init is unknown.
    """
    if expert_init not in EXPERT_INITS:
        raise MixMoEError(f"expert_init must be one of {', '.join(EXPERT_INITS)}, not {expert_init!r}.")
    if expert_init == "copy":
        return ffn_hidden_size
    if ffn_hidden_size % num_experts:
        raise MixMoEError(
            f"ffn_hidden_size={ffn_hidden_size} is not divisible by num_experts_per_group={num_experts}: "
            "choose a divisor of it (--num-experts-per-group), or --expert-init copy."
        )
    return ffn_hidden_size // num_experts


def pack_gate_up(gate: Array, up: Array) -> Array:
    """Stack gate and up projections, gate rows first.

    Args:
        gate: [F, H].
        up: [F, H].

    Returns:
        [2F, H], the dtype of the inputs.
    """
    return concatenate((gate, up))


def experts_from_dense_gate_up(gate: Array, up: Array, num_experts: int, expert_init: str) -> Array:
    """Cut the dense gate and up projections into the experts' packed first layer (eq. 1-2).

    Expert e of `slice` gets rows [e F', (e+1) F') of gate, then the same rows of up.

    Args:
        gate: [F, H].
        up: [F, H].
        num_experts: n.
        expert_init: `slice` or `copy`.

    Returns:
        [n, 2F', H], the dtype of the inputs.

    Raises:
        MixMoEError: F is not divisible by n, or expert_init is unknown.
    """
    inner = expert_ffn_hidden_size(gate.shape[0], num_experts, expert_init)
    if expert_init == "copy":
        return concatenate([pack_gate_up(gate, up)[None]] * num_experts)
    return concatenate([matrix.reshape(num_experts, inner, -1) for matrix in (gate, up)], 1)


def experts_from_dense_down(down: Array, num_experts: int, expert_init: str) -> Array:
    """Cut the dense down projection into the experts' second layer (eq. 1-2).

    Expert e of `slice` gets columns [e F', (e+1) F'), so that the experts' sum is the dense FFN.

    Args:
        down: [H, F].
        num_experts: n.
        expert_init: `slice` or `copy`.

    Returns:
        [n, H, F'], the dtype of the input; not necessarily contiguous.

    Raises:
        MixMoEError: F is not divisible by n, or expert_init is unknown.
    """
    inner = expert_ffn_hidden_size(down.shape[1], num_experts, expert_init)
    if expert_init == "copy":
        return concatenate([down[None]] * num_experts)
    return down.reshape(down.shape[0], num_experts, inner).swapaxes(0, 1)


def init_router_weight(num_experts: int, hidden_size: int, init_std: float, generator: torch.Generator) -> Tensor:
    """Draw a router weight (W_h or W_f of eq. 4-5) from normal(0, init_std).

    Args:
        num_experts: n.
        hidden_size: H.
        init_std: the base model's initialiser standard deviation.
        generator: a CPU generator; the draw depends on nothing else.

    Returns:
        [n, H] float32.
    """
    import torch

    return torch.empty(num_experts, hidden_size, dtype=torch.float32).normal_(0.0, init_std, generator=generator)
