"""Spectral features of the router and how they fold into its weight. Pure torch.

A spectral transform is linear, f = scale * M h with M an [H, H] matrix, so that W_f f = scale * (W_f M) h: the router
never transforms activations, it folds the [n, H] weight once per step.

Shape legend: n experts of a group, H hidden_size, ... any leading dimensions.
Source: Mix-MoE (arXiv:2605.24681) eq. 3 (FFT) and Table V (DCT, random projection, no transform). Deviates: D3, D4
(model/README.md).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch


def spectral_features(
    hidden_states: torch.Tensor, transform: str, norm: str = "ortho", scale: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """Return f = scale * M h, the definition that folding replaces (for tests and explanation).

    Args:
        hidden_states: [..., H], floating point.
        transform: "fft" (Re FFT), "dct" (DCT-II) or "random" (Gaussian projection).
        norm: "ortho", or "backward": no normalisation (DCT-II then has scipy's factor 2, and the entries of the random
            projection have standard deviation 1 instead of 1 / sqrt(H)).
        scale: factor of the features.
        seed: seed of the random projection.

    Returns:
        [..., H] float32.

    Raises:
        ValueError: the transform is unknown.
    """
    h = hidden_states.float()
    if transform == "fft":
        return scale * torch.fft.fft(h, norm=norm).real
    if transform == "dct":
        identity = torch.eye(h.shape[-1], device=h.device)
        return scale * h @ _transposed_dct(identity, norm).T
    if transform == "random":
        return scale * h @ random_projection(h.shape[-1], norm, seed, h.device).T
    raise ValueError(f"unknown spectral transform {transform!r}.")


def fold_spectral_weight(
    spectral_weight: torch.Tensor, transform: str, norm: str = "ortho", seed: int = 0
) -> torch.Tensor:
    """Return W_f M, so that `scale * h @ result.T == spectral_features(h, ..., scale) @ W_f.T`.

    Differentiable: autograd carries gradients back to W_f exactly. For the FFT, M is symmetric (cos(2 pi k j / H)), so
    W_f M is the real FFT of W_f's own rows. For the DCT, W_f D is the transposed transform of the rows. Any H.

    Source: Mix-MoE (arXiv:2605.24681) eq. 3-5. Deviates: D4 (model/README.md).

    Args:
        spectral_weight: W_f, [n, H], floating point.
        transform: "fft", "dct" or "random".
        norm: "ortho" or "backward", as in `spectral_features`.
        seed: seed of the random projection.

    Returns:
        [n, H] float32.

    Raises:
        ValueError: the transform is unknown.
    """
    rows = spectral_weight.float()
    if transform == "fft":
        return _RealFFT.apply(rows, norm)
    if transform == "dct":
        return _transposed_dct(rows, norm)
    if transform == "random":
        return rows @ random_projection(rows.shape[-1], norm, seed, rows.device)
    raise ValueError(f"unknown spectral transform {transform!r}.")


def fold_router_weight(
    weight: torch.Tensor,
    spectral_weight: torch.Tensor | None,
    transform: str,
    norm: str = "ortho",
    scale: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Return the plain router weight W_h + scale * W_f M that stands for the pair (W_h, W_f).

    Args:
        weight: W_h, [n, H].
        spectral_weight: W_f, [n, H], or None with the transform "none".
        transform: "fft", "dct", "random" or "none".
        norm, scale, seed: as in `spectral_features`.

    Returns:
        [n, H] float32.

    Raises:
        ValueError: the transform is unknown, or W_f is there with "none" or missing without.
    """
    if (spectral_weight is None) != (transform == "none"):
        raise ValueError(f"spectral transform {transform!r} does not go with the spectral weight given.")
    if spectral_weight is None:
        return weight.float()
    return torch.add(weight, fold_spectral_weight(spectral_weight, transform, norm, seed), alpha=scale).float()


class _RealFFT(torch.autograd.Function):
    """Re FFT of each row. M is symmetric: the gradient takes the same way, at half the kernels of autograd's own."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, norm: str) -> torch.Tensor:
        ctx.norm = norm
        return torch.fft.fft(rows, norm=norm).real

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.fft.fft(grads[0], norm=ctx.norm).real, None


def _transposed_dct(rows: torch.Tensor, norm: str) -> torch.Tensor:
    """Return rows @ D for the DCT-II matrix D, by one FFT of length 2 H.

    D_kj = c_k cos(pi k (2 j + 1) / (2 H)), orthonormal c_0 = sqrt(1/H), c_k = sqrt(2/H); unnormalised c_k = 2.
    """
    size = rows.shape[-1]
    k = torch.arange(size, device=rows.device, dtype=torch.float64)
    factor = torch.full_like(k, 2.0 if norm == "backward" else math.sqrt(2 / size))
    if norm == "ortho":
        factor[0] = math.sqrt(1 / size)
    twiddle = torch.polar(factor, -math.pi * k / (2 * size)).to(torch.complex64)
    return torch.fft.fft(rows * twiddle, n=2 * size).real[..., :size]


@functools.lru_cache(maxsize=4)
def random_projection(hidden_size: int, norm: str, seed: int, device: torch.device) -> torch.Tensor:
    """Return the fixed Gaussian projection R of a seed: the same on every rank and device, made on the CPU.

    Args:
        hidden_size: H.
        norm: "ortho" or "backward".
        seed: what R depends on beside H.
        device: where R is put.

    Returns:
        [H, H] float32, entries of standard deviation 1 / sqrt(H) ("ortho") or 1 ("backward").
    """
    with torch.inference_mode(False):  # the cached tensor must serve training too
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(hidden_size, hidden_size, generator=generator)
        return (projection / math.sqrt(hidden_size) if norm == "ortho" else projection).to(device)
