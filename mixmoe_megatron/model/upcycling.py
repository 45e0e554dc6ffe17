"""Upcycling: where the tensors of a Mix-MoE layer come from. Pure functions of numpy arrays.

Source: Mix-MoE (arXiv:2605.24681) section III-A: the LM experts are slices of the dense FFN. Deviates: D5
(model/README.md). Sizes come as arguments; nothing here knows Megatron or Hugging Face. The cuts only move values:
conversions run them on the numbers of slices in place of the values, so that an array may be of any dtype.

Shapes: H hidden_size, F ffn_hidden_size, n experts per group, F' = moe_ffn_hidden_size (F / n for `slice` and
`important`, F for `copy`). With shared experts, F here is what these leave of the FFN: its neurons after theirs, which
come first. A gated FFN is packed the Megatron way: F gate rows, then F up rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixmoe_megatron.errors import MixMoEError

EXPERT_INITS = ("slice", "important", "copy")
SHARED = 0.5  # of the neurons of an expert of `important`, which all of them have
Array = np.ndarray[Any, Any]


def expert_ffn_hidden_size(ffn_hidden_size: int, num_experts: int, expert_init: str, shared_experts: int = 0) -> int:
    """Return F', the inner size of one expert.

    Args:
        ffn_hidden_size: F of the dense FFN.
        num_experts: n, experts per group.
        expert_init: `slice` or `important` (F' = F / n), or `copy` (F' = F).
        shared_experts: slices of F beside the n, as wide as they.

    Raises:
        MixMoEError: F is not divisible by the number of slices, or expert_init is unknown.
    """
    if expert_init not in EXPERT_INITS:
        raise MixMoEError(f"expert_init must be one of {', '.join(EXPERT_INITS)}, not {expert_init!r}.")
    if expert_init == "copy":
        return ffn_hidden_size
    if ffn_hidden_size % (num_experts + shared_experts):
        if shared_experts:
            raise MixMoEError(
                f"ffn_hidden_size={ffn_hidden_size} is not divisible by num_experts_per_group={num_experts} plus "
                f"shared_experts={shared_experts}: choose numbers whose sum divides it (--num-experts-per-group, "
                "--shared-experts)."
            )
        raise MixMoEError(
            f"ffn_hidden_size={ffn_hidden_size} is not divisible by num_experts_per_group={num_experts}: "
            "choose a divisor of it (--num-experts-per-group), or --expert-init copy."
        )
    return ffn_hidden_size // (num_experts + shared_experts)


def important_neurons(importance: Array, num_experts: int) -> Array:
    """Deal the neurons of a dense FFN out to experts: each gets the most important ones, and a share of the next.

    SHARED of an expert's neurons are the same for all experts, so that what every token needs is there whichever expert
    it goes to; the rest are dealt out in turn, in the order of importance. The least important ones go to no expert.

    Args:
        importance: [F], the larger the more important.
        num_experts: n, a divisor of F.

    Returns:
        [F] int64, numbers of neurons: in this order, `slice` cuts them into the n experts.
    """
    width = len(importance) // num_experts
    order, shared = np.argsort(-importance, kind="stable"), round(SHARED * width)
    rest = order[shared:]
    return np.concatenate([[*order[:shared], *rest[e::num_experts][: width - shared]] for e in range(num_experts)])


def pack_gate_up(gate: Array, up: Array) -> Array:
    """Stack gate and up projections, gate rows first.

    Args:
        gate: [F, H].
        up: [F, H].

    Returns:
        [2F, H], the dtype of the inputs.
    """
    return np.concatenate((gate, up))


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
        return np.stack([pack_gate_up(gate, up)] * num_experts)
    return np.concatenate([matrix.reshape(num_experts, inner, -1) for matrix in (gate, up)], 1)


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
        return np.stack([down] * num_experts)
    return down.reshape(down.shape[0], num_experts, inner).swapaxes(0, 1)
