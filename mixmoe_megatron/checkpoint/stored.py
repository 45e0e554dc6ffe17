"""Tensors that lie in files: a region of one is read, and, as long as the tensor has no gaps, no byte beside it."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mixmoe_megatron.checkpoint.bits import Bits, as_bytes, bits_type

Region = tuple[slice, ...]  # start and stop on each axis, both given


def whole(shape: tuple[int, ...]) -> Region:
    """Return the region that is all of a tensor."""
    return tuple(slice(0, length) for length in shape)


def lengths(region: Region) -> tuple[int, ...]:
    """Return the shape of a region."""
    return tuple(cut.stop - cut.start for cut in region)


def overlap(one: Region, other: Region) -> Region | None:
    """Return what two regions of a tensor share; None if they share nothing."""
    shared = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return shared if all(cut.start < cut.stop for cut in shared) else None


def shifted(region: Region, origin: Region) -> Region:
    """Return a region as seen from the first value of another."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(region, origin, strict=True))


def in_order(shape: tuple[int, ...], most: int) -> Iterator[Region]:
    """Cut a tensor into regions that follow each other in memory.

    Args:
        shape: of the tensor.
        most: values of one region.
    """
    if 0 in shape:
        return
    axis, inner = len(shape), 1  # the axes from `axis` on are taken whole
    while axis and inner * shape[axis - 1] <= most:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield whole(shape)
        return
    step = most // inner
    for indices in itertools.product(*map(range, shape[: axis - 1])):
        for start in range(0, shape[axis - 1], step):
            cut = slice(start, min(start + step, shape[axis - 1]))
            yield (*(slice(i, i + 1) for i in indices), cut, *whole(shape[axis:]))


def pieces(shape: tuple[int, ...], region: Region) -> tuple[list[int], int]:
    """Return where the contiguous pieces of a region begin, in values from the tensor's first, and the size of each."""
    starts, size, stride, is_cut = [0], 1, 1, False
    for length, cut in zip(reversed(shape), reversed(region), strict=True):
        if is_cut:
            starts = [index * stride + start for index in range(cut.start, cut.stop) for start in starts]
        else:
            starts, size = [cut.start * stride], (cut.stop - cut.start) * stride
            is_cut = cut.stop - cut.start < length
        stride *= length
    return starts, size


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is.

    Attributes:
        path: of the file.
        start: position of the first value in the file, in bytes.
        dtype: name in torch.
        strides: in values; None: the values follow each other.
    """

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def read(self, region: Region) -> Bits:
        """Return the values of a region, which lies within the tensor; not necessarily contiguous.

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        strides = self.strides or contiguous_strides(self.shape)
        order = sorted(range(len(strides)), key=lambda axis: -strides[axis])  # as they lie in the file
        shape = tuple(self.shape[axis] for axis in order)
        gaps = zip(contiguous_strides(shape), (strides[axis] for axis in order), shape, strict=True)
        if all(one == other or length == 1 for one, other, length in gaps):
            values = self._read_pieces(shape, tuple(region[axis] for axis in order))
            return values.transpose([order.index(axis) for axis in range(len(order))])
        return self._read_strided(strides, region)

    @property
    def reach(self) -> int:
        """How many values of the file the tensor extends over."""
        return _reach(self.shape, self.strides or contiguous_strides(self.shape))

    def _read_pieces(self, shape: tuple[int, ...], region: Region) -> Bits:
        """Read what has no gaps and lies in the order of its axes.

        Where a region lies in many pieces (columns of a matrix) the kernel hears of all before the first is read, so
        that a disk need not be waited for piece by piece.
        """
        values = np.empty(lengths(region), bits_type(self.dtype))
        starts, count = pieces(shape, region)
        size = count * values.itemsize
        positions = [self.start + start * values.itemsize for start in starts] if size else []
        rest = as_bytes(values)
        file = os.open(self.path, os.O_RDONLY)
        try:
            for position in positions if len(positions) > 1 else []:
                os.posix_fadvise(file, position, size, os.POSIX_FADV_WILLNEED)
            for number, position in enumerate(positions):
                _read_into(file, position, rest[number * size : (number + 1) * size])
        finally:
            os.close(file)
        return values

    def _read_strided(self, strides: tuple[int, ...], region: Region) -> Bits:
        """Read from a region's first value to its last, and leave out what lies between its values."""
        first = sum(cut.start * stride for cut, stride in zip(region, strides, strict=True))
        span = (slice(first, first + _reach(lengths(region), strides)),)
        values = self._read_pieces((self.reach,), span)
        return as_strided(values, lengths(region), [stride * values.itemsize for stride in strides])


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return over how many values a tensor extends from its first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in values, of a tensor whose values follow each other."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _read_into(file: int, position: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        read = os.preadv(file, [buffer[done:]], position + done)
        if not read:
            raise OSError("it ends too early")
        done += read
