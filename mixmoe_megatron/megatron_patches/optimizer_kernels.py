"""Torch's own functions where Megatron's fused optimizer kernels are missing, or are there and cannot run.

Megatron takes its Adam, norms and scalings from Transformer Engine or Apex as soon as these can be imported: CUDA
kernels, on a machine without CUDA too. Without them its own norm makes the host wait for the GPU once a tensor (60
times a step in a model of 8 layers, as `make test-gpu` counts it).

Source: `megatron.core.optimizer` (its modules, `clip_grads` and `distrib_optimizer`) and
`megatron.training.utils.common_utils`, read at megatron-core 0.19.2.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from megatron.training.utils import common_utils

from mixmoe_megatron.megatron_patches.cpu_mode import is_cpu_mode


def use_torch_kernels() -> None:
    """Put torch's functions in place of fused ones in CPU mode, and of Megatron's own norm wherever that is used."""
    if is_cpu_mode():
        distrib_optimizer.Adam, optimizer.Adam, optimizer.SGD = torch.optim.AdamW, _cpu_adam, torch.optim.SGD
        optimizer.USING_PYTORCH_OPTIMIZER = False  # or Megatron makes torch's Adam itself, and not fused
        distrib_optimizer.HAVE_APEX_OR_TE = False
    if is_cpu_mode() or optimizer.USING_PYTORCH_OPTIMIZER:
        for module in (base_optimizer, clip_grads, common_utils):
            module.multi_tensor_applier = utils.local_multi_tensor_applier
        for module in (base_optimizer, clip_grads):
            module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
        clip_grads.multi_tensor_scale_tensor_impl = None
        clip_grads.l2_norm_impl = common_utils.multi_tensor_l2norm = _norm


def _cpu_adam(params: Any, *, adam_w_mode: bool, **options: Any) -> torch.optim.Optimizer:
    """Return torch's Adam of one pass over the memory: its plain one takes 3 times as long, a third of a step."""
    return (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(params, fused=True, **options)


def _norm(chunk_size: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], *args: Any) -> Any:
    """Return the norm of all tensors, [1] float32 on their device, and None, as Megatron's kernels do."""
    return torch.nn.utils.get_total_norm(tensors[0]).float().view(1), None
