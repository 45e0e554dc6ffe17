"""Tensors without values in the place of a device's: whoever makes the host wait for the device is told on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixmoe_megatron.megatron_patches import cpu_mode

#: Operations whose result, or the size of whose result, is known when the device has done all work before it.
_VALUE_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_META = torch.device("meta")


class HostSync(AssertionError):
    """The host would have waited for the device."""


class _RefuseSyncs(TorchDispatchMode):
    """Refuses what makes the host wait when the meta device is a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        name = func.overloadpacket.__name__
        if _waits(name, func.tags, tensors) or _copy_waits(name, args, kwargs):
            raise HostSync(f"{func} of {[(value.device.type, tuple(value.shape)) for value in tensors]}")
        return func(*args, **kwargs)


def _waits(name: str, tags: Any, tensors: list[torch.Tensor]) -> bool:
    on_device = [value for value in tensors if value.is_meta]
    if name in ("index", "index_put_", "_index_put_impl_"):  # where a mask is true must be known, not so whole numbers
        masks = [value for value in on_device[1:] if value.dtype in (torch.bool, torch.uint8)]
        fills_one_value = name != "index" and on_device[-1].numel() == 1  # then CUDA fills by the mask
        return bool(masks) and not fills_one_value
    return bool(on_device) and bool(_VALUE_DEPENDENT.intersection(tags))


def _copy_waits(name: str, args: Any, kwargs: Any) -> bool:
    """From the device always (the host wants the values), to the device if it is not told to go on."""
    if name == "_to_copy":
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        asynchronous = kwargs.get("non_blocking", False)
    elif name == "copy_":
        source, target = args[1].device, args[0].device
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        return False
    return source != target and (source == _META or not asynchronous)


@contextmanager
def refused_syncs() -> Iterator[None]:
    """In CPU mode, one process: who asks for a CUDA device gets the meta device, a wait for it raises HostSync."""

    def made_at_once(factory: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = factory(*args, **kwargs)
            if result.is_meta:
                raise HostSync("a tensor of the host's numbers made on the device")
            return result

        return make

    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False) -> torch.Tensor:
        return self.to(_META, non_blocking=non_blocking)

    with (
        mock.patch.object(cpu_mode, "_CPU", _META),
        mock.patch.object(torch.Tensor, "cuda", cuda),
        mock.patch.object(torch, "tensor", made_at_once(torch.tensor)),
        mock.patch.object(torch, "as_tensor", made_at_once(torch.as_tensor)),
        mock.patch.object(torch.distributed, "all_reduce", lambda *_, **__: None),
        _RefuseSyncs(),
    ):
        yield
