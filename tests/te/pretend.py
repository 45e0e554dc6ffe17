"""Transformer Engine without a GPU: its modules can be made, when they believe that there is CUDA, but not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode

enable_cpu_mode()  # before torch.cuda.is_available() tells lies


@contextmanager
def pretend_cuda(on: bool = True) -> Iterator[None]:
    """Within the context torch.cuda.is_available() is true (if `on`); cpu_mode's stand-ins answer all else."""
    if not on:
        yield
        return
    with mock.patch("torch.cuda.is_available", return_value=True):
        yield
