"""Fused optimizer kernels give way to torch's where they cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode
from mixmoe_megatron.megatron_patches.optimizer_kernels import use_torch_kernels


def needs_cuda(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("no CUDA-capable device is detected")


def test_installed_fused_kernels_are_not_used_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    enable_cpu_mode()
    for module, names in (
        (optimizer, ("Adam", "SGD")),
        (distrib_optimizer, ("Adam",)),
        (base_optimizer, ("multi_tensor_applier", "multi_tensor_scale_impl")),
        (clip_grads, ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, needs_cuda)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_tensor_impl", needs_cuda)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    use_torch_kernels()
    weight = torch.nn.Parameter(torch.ones(2))
    adam = optimizer.Adam([weight], adam_w_mode=True, lr=0.1)  # as Megatron calls it where a fused one is installed
    assert type(adam) is torch.optim.AdamW and adam.param_groups[0]["fused"]
    assert type(optimizer.Adam([weight], adam_w_mode=False, lr=0.1)) is torch.optim.Adam
    assert not distrib_optimizer.HAVE_APEX_OR_TE
    this, that = [torch.full((4,), 3.0)], [torch.zeros(4)]
    base_optimizer._multi_tensor_copy_this_to_that(this, that, torch.zeros(1, dtype=torch.int))
    assert torch.equal(this[0], that[0])


class RaiseAtSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_norm_is_megatrons_and_makes_the_host_wait_for_nothing() -> None:
    enable_cpu_mode()
    use_torch_kernels()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (2, 2, 2))]
    expected, _ = utils.local_multi_tensor_l2_norm(0, None, [tensors], False)
    with RaiseAtSynchronisation():
        actual, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [tensors], False)
    assert actual.shape == (1,) and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
