"""Tensors by name: those that can be read, from whatever holds them, and those that are to be written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mixmoe_megatron.checkpoint.bits import ITEMSIZE, Bits, as_bytes, to_torch
from mixmoe_megatron.checkpoint.stored import Region, in_order
from mixmoe_megatron.errors import MixMoEError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 1 << 22  # small enough for a processor's cache, large enough for Python


class TensorSource(Protocol):
    """Tensors by name, of which any region can be read."""

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype in torch."""

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a tensor between start and stop on each axis."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: what it is now, its bits when they are asked for.

    Attributes:
        dtype: name in torch.
        read: the bits of a region, without reading the rest; not necessarily contiguous.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[Region], Bits]

    def part(self, region: Region) -> Tensor:
        """Return the values of a region; what lies beyond the shape is left out.

        Raises:
            MixMoEError: the weights are damaged.
        """
        clipped = tuple(slice(*cut.indices(length)[:2]) for cut, length in zip(region, self.shape, strict=True))
        return to_torch(self.read(clipped), self.dtype)

    def blocks(self) -> Iterator[memoryview]:
        """Yield all bytes in their order, a block at a time.

        Raises:
            MixMoEError: the weights are damaged.
        """
        for region in in_order(self.shape, BLOCK_BYTES // ITEMSIZE[self.dtype]):
            yield as_bytes(self.read(region))

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def split_by_bytes(plan: list[LazyTensor], max_bytes: int) -> list[list[LazyTensor]]:
    """Fill files in the plan's order.

    Args:
        plan: the tensors.
        max_bytes: of one file; a tensor larger than that gets one of its own.
    """
    files: list[list[LazyTensor]] = [[]]
    used = 0
    for tensor in plan:
        if files[-1] and used + tensor.num_bytes > max_bytes:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += tensor.num_bytes
    return files


def verify_written(plan: list[LazyTensor], written: TensorSource) -> None:
    """Check that what was written, read back from its headers, is what was planned.

    Raises:
        MixMoEError: a tensor is missing or differs in shape or dtype.
    """
    planned = {t.name: (t.shape, t.dtype) for t in plan}
    found = {name: (written.shape(name), written.dtype(name)) for name in written.names()}
    if planned != found:
        name = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))[0]
        raise MixMoEError(f"{name} was not written as planned: {found.get(name)} instead of {planned.get(name)}.")
