"""Check 0: what this machine has, and that the cluster examples' flags build and train a model on it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from tests.gpu.harness import DEVICE, Check, NotRun, Rows


def run(rows: Rows) -> None:
    """Tell what is installed and which attention kernels run."""
    import torch

    with rows.row("Megatron's dataset helpers import"):
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    for package in ("transformer_engine.pytorch", "apex", "flash_attn", "deep_ep"):
        with rows.row(f"{package} imports") as facts:
            if importlib.util.find_spec(package.split(".")[0]) is None:
                raise NotRun("not installed; optional")
            facts["version"] = getattr(importlib.import_module(package), "__version__", "unknown")
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        for layout in ("sbhd", "thd"):
            with rows.row(f"attention {name}, {layout}") as facts:
                if DEVICE == "cpu" and name not in ("FLASH_ATTENTION", "MATH"):
                    raise NotRun("a CUDA kernel")
                try:
                    facts["error"] = attention_error(getattr(torch.nn.attention.SDPBackend, name), layout)
                except RuntimeError as error:
                    if "No available kernel" not in str(error):
                        raise
                    raise NotRun("torch has no such kernel for grouped query heads here") from error
                assert facts["error"] < 2e-2


def attention_error(kernel: Any, layout: str) -> float:
    """Run this package's core attention with one of torch's kernels, bfloat16; its error against float32's MATH."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mixmoe_megatron.model.attention import TorchCoreAttention
    from tests.gpu.layer import start_megatron
    from tests.helpers.megatron import make_config, make_options, process_groups

    start_megatron()
    config = make_config(make_options(moe_every=2), 1, hidden_size=256, num_attention_heads=4, num_query_groups=2)
    core = TorchCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=process_groups())
    generator = torch.Generator().manual_seed(1)
    shape = (64, 1) if layout == "sbhd" else (64,)
    query, key, value = (torch.randn(*shape, heads, 64, generator=generator).to(DEVICE) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 10, 64], dtype=torch.int32, device=DEVICE)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=54, max_seqlen_kv=54
    )
    kwargs = {"packed_seq_params": packed} if layout == "thd" else {}
    with sdpa_kernel(SDPBackend.MATH):
        exact = core(query, key, value, None, **kwargs)
    with sdpa_kernel(kernel):
        actual = core(query.bfloat16(), key.bfloat16(), value.bfloat16(), None, **kwargs)
    return ((actual.float() - exact).abs().max() / exact.abs().max()).item()


CHECKS = [Check("environment", "what is installed, and which attention kernels run", run)]
