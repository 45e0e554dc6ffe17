"""Choice of the experts' backend: Transformer Engine, torch's grouped GEMM, or one GEMM per expert."""

from __future__ import annotations

import functools
import logging

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank

from mixmoe_megatron.errors import MixMoEError

logger = logging.getLogger(__name__)

_GEMM_ALIGNMENT_BYTES = 16  # torch's grouped_mm wants row strides that are multiples of this


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether Megatron's Transformer Engine modules make up the model: asked for, and installed."""
    return HAVE_TE and config.transformer_impl == "transformer_engine"


def choose_experts_backend(config: TransformerConfig, num_per_group: int) -> str:
    """Return "te", "torch" or "sequential", and log once which and why.

    Args:
        config: the Transformer configuration; `experts_backend` is "auto" where a plain one lacks it.
        num_per_group: experts of a group on this rank; one expert needs no grouping.

    Raises:
        MixMoEError: the backend asked for is missing or does not support the config or the option `base_expert`.
    """
    wanted = getattr(config, "experts_backend", "auto")
    if wanted == "te" and not HAVE_TE:
        raise MixMoEError("experts_backend=te needs Transformer Engine, which is not installed (use auto or torch).")
    is_uneven = getattr(config, "base_expert", False)
    if wanted == "te" and is_uneven:
        raise MixMoEError("experts_backend=te does not go with base_expert: it stores as many experts on each rank.")
    capability = cuda_capability()
    misfit = _grouped_mm_misfit(config, capability)
    if wanted == "torch" and misfit and num_per_group > 1:
        raise MixMoEError(f"experts_backend=torch: {misfit} (use auto or sequential).")
    if wanted != "auto":
        backend, why = wanted, "asked for"
    elif uses_transformer_engine(config) and not is_uneven:
        backend, why = "te", "Transformer Engine is there"
    elif num_per_group == 1:
        backend, why = "sequential", "one expert of a group per rank is a plain GEMM"
    elif reason := misfit or _grouped_mm_slowness(config.params_dtype, capability):
        backend, why = "sequential", reason
    else:
        backend, why = "torch", "torch's grouped GEMM is one kernel here, and Transformer Engine is not used"
    if backend != "te":
        _check_no_te_features(config, backend)
    _log_once(backend, why)
    return backend


def cuda_capability() -> tuple[int, int] | None:
    """Return the compute capability of this process's GPU, None on a CPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _grouped_mm_misfit(config: TransformerConfig, capability: tuple[int, int] | None) -> str | None:
    """Return why torch's grouped GEMM cannot be used with a compute capability (None: a CPU), or None."""
    if capability is not None and capability[0] > 9:
        # pytorch issue 172439
        return f"it gives experts without tokens wrong gradients on compute capability {capability[0]}.{capability[1]}"
    alignment = _GEMM_ALIGNMENT_BYTES // config.params_dtype.itemsize
    ffn_size = (config.moe_ffn_hidden_size or 0) // (config.expert_tensor_parallel_size or 1)
    for name, size in (("hidden_size", config.hidden_size), ("moe_ffn_hidden_size per rank", ffn_size)):
        if size % alignment:
            return f"{name}={size} is not a multiple of {alignment}, which torch's grouped GEMM needs"
    return None


def _grouped_mm_slowness(dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Return why torch's grouped GEMM is no faster than a GEMM per expert, or None: it is one kernel."""
    if capability is None:
        return "torch's grouped GEMM is a loop on a CPU"
    if capability[0] < 9 or dtype != torch.bfloat16:
        name, (major, minor) = str(dtype).removeprefix("torch."), capability
        return f"torch's grouped GEMM is a loop that waits for the GPU in {name} on compute capability {major}.{minor}"
    return None


def _check_no_te_features(config: TransformerConfig, backend: str) -> None:
    for name in ("fp8", "fp4", "delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"):
        if getattr(config, name, None):
            raise MixMoEError(f"{name} needs experts_backend=te, but the experts' backend is {backend}.")


@functools.cache  # the second and later layers of a model do not say it again
def _log_once(backend: str, why: str) -> None:
    log_single_rank(logger, logging.INFO, f"Mix-MoE experts run on the backend {backend}: {why}.")
