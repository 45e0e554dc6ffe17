"""Routers outside a model, as numpy arrays: drawn where a dense model is upcycled, folded where one is exported.

LoRA's first matrices are drawn here too. A conversion needs no more than these few rows computed, and torch takes
longer to import than to convert. So the fold of `spectral`, which trains, is written down here once more; a test
compares the two.

Shape legend: n experts of a group, E experts of all groups, H hidden_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.upcycling import Array


def new_router_weight(name: str, shape: tuple[int, ...], init_std: float, seed: int) -> Array:
    """Draw a router's weight (W_h or W_f of eq. 4-5) from normal(0, init_std).

    What is drawn depends on the seed and the weight's name alone, not on an order or on a parallel layout: conversions
    and every rank of a training run draw the same.

    Args:
        name: of the weight in a checkpoint, such as `decoder.layers.3.mlp.router.lm.weight`.
        shape: [n, H].
        init_std: standard deviation of the weights (options.router_weight_std).
        seed: any integer.

    Returns:
        [n, H] float32.
    """
    return _generator(name, seed).standard_normal(shape, dtype=np.float32) * np.float32(init_std)


def new_lora_matrix(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """Draw a matrix A of LoRA from the uniform distribution between -1 and 1 over the square root of its columns.

    Source: PEFT's default, kaiming_uniform(a = sqrt(5)).

    Args:
        name: of the matrix in a checkpoint.
        shape: [r, in].
        seed: any integer.

    Returns:
        [r, in] float32.
    """
    drawn = _generator(name, seed).random(shape, dtype=np.float32)
    return (2 * drawn - 1) / np.float32(np.sqrt(shape[1]))


def _generator(name: str, seed: int) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def folded_router(weights: Sequence[Array], options: MixMoEOptions) -> Array:
    """Return the one plain linear layer that the groups' routers are: W_h + scale * W_f M of each, below each other.

    Source: Mix-MoE (arXiv:2605.24681) eq. 3-5; see `spectral.fold_router_weight`.

    Args:
        weights: of each group W_h and, unless the transform is "none", W_f; [n, H] float32.
        options: of the model.

    Returns:
        [E, H] float32, the experts in logical order.
    """
    if options.spectral_transform == "none":
        return np.concatenate(weights)
    plain, spectral = np.concatenate(weights[::2]), np.concatenate(weights[1::2])
    folded = plain + options.spectral_scale * _times_transform(spectral.astype(np.float64), options)
    return folded.astype(np.float32)


def _times_transform(rows: Array, options: MixMoEOptions) -> Array:
    """Return rows @ M, [E, H] float64, for the matrix M of the options' transform."""
    size = rows.shape[-1]
    norm: Literal["ortho", "backward"] = "ortho" if options.spectral_norm == "ortho" else "backward"
    if options.spectral_transform == "fft":
        return np.fft.fft(rows, norm=norm).real
    if options.spectral_transform == "dct":
        k = np.arange(size)
        factor = np.full(size, 2.0) if norm == "backward" else np.sqrt(np.where(k == 0, 1, 2) / size)
        return np.fft.fft(rows * factor * np.exp(-0.5j * np.pi * k / size), n=2 * size).real[..., :size]
    import torch

    from mixmoe_megatron.model.spectral import random_projection  # what torch's generator draws

    return rows @ random_projection(size, norm, options.spectral_seed, torch.device("cpu")).numpy()
