"""A region of a tensor from the slices of the other side's tensors that make it, for layouts that only move values.

A layout moves slices along the axes in which the two sides of a row differ, and leaves the axes that they share as they
are. Which slice goes where the layout tells itself: it is run on the slices' numbers in place of their values. So the
mapping tables stay the one place that knows, and nothing but the slices is read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, bits_type
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.model.mapping import Context, Row, Sizes


class Movement:
    """Where the values of one tensor of a row come from. `movement` makes these, once for all layers.

    Args:
        row: of a table; its layout moves values and makes zeros, no more.
        to: the tensor's side, `megatron` or `hf`.
        position: of the tensor among the row's existing tensors of its side.
        sizes: of the model.
    """

    def __init__(self, row: Row, to: str, position: int, sizes: Sizes) -> None:
        sides = {
            side: [t.shape.split() for t in tensors if sizes.holds(t.when)]
            for side, tensors in (("hf", row.hf), ("megatron", row.megatron))
        }
        self._axes = sides.pop(to)[position]  # their symbols
        (self._source_axes,) = sides.values()
        shared = set(self._axes).intersection(*self._source_axes)
        if shared == set(self._axes):  # nothing moves: the first axis may as well
            shared.remove(self._axes[0])
        self._moved = set(self._axes).union(*self._source_axes) - shared
        shapes = [[sizes.shape(s)[0] if s in self._moved else 1 for s in symbols] for symbols in self._source_axes]
        # A number lies free before each source, so that no run goes on from one into the next; 0 stands for zeros.
        *firsts, _ = accumulate((math.prod(shape) + 1 for shape in shapes), initial=2)
        self._firsts = firsts
        numbers = [np.arange(f, f + math.prod(shape)).reshape(shape) for f, shape in zip(firsts, shapes, strict=True)]
        self._numbers: Bits = getattr(row.layout, f"to_{to}")(numbers, sizes, Context(), "")[position]

    def read(self, region: Region, names: Sequence[str], dtype: str, read: Callable[[str, Region], Bits]) -> Bits:
        """Return a region's values, not necessarily contiguous.

        Args:
            region: within the tensor.
            names: of the row's existing tensors on the other side.
            dtype: of all of them.
            read: values of a region of one of them.
        """
        cut = dict(zip(self._axes, region, strict=True))
        numbers = self._numbers[tuple(cut[s] if s in self._moved else slice(None) for s in self._axes)]
        if not self._source_axes:
            return np.zeros(numbers.shape, bits_type(dtype))
        order, count = self._source_axes[0], numbers.size  # all sources have their axes in the same order
        (axis,) = (axis for axis, symbol in enumerate(order) if symbol in self._moved)
        runs = list(_runs(numbers))
        if len(runs) == 1 and runs[0][0]:
            values = read(*self._place(*runs[0], names, cut))
        else:
            shape = [count if s in self._moved else cut[s].stop - cut[s].start for s in order]
            values, done = np.zeros(shape, bits_type(dtype)), 0
            for first, length in runs:
                if first:
                    values[(*[slice(None)] * axis, slice(done, done + length))] = read(
                        *self._place(first, length, names, cut)
                    )
                done += length
        moved = [symbol for symbol in self._axes if symbol in self._moved]
        shape = [numbers.shape[self._axes.index(symbol)] for symbol in moved]
        values = values.reshape(*values.shape[:axis], *shape, *values.shape[axis + 1 :])
        found = [*order[:axis], *moved, *order[axis + 1 :]]
        return values.transpose([found.index(symbol) for symbol in self._axes])

    def _place(self, first: int, length: int, names: Sequence[str], cut: dict[str, slice]) -> tuple[str, Region]:
        """Return the tensor and region of so many slices from a number on."""
        source = bisect_right(self._firsts, first) - 1
        start = first - self._firsts[source]
        slices = slice(start, start + length)
        return names[source], tuple(slices if s in self._moved else cut[s] for s in self._source_axes[source])


movement = lru_cache(maxsize=256)(Movement)


def _runs(numbers: Bits) -> Iterator[tuple[int, int]]:
    """Yield first number and length of each run that counts up by one, in the order of memory."""
    flat = numbers.reshape(-1)
    for run in np.split(flat, np.flatnonzero(np.diff(flat) != 1) + 1):
        if run.size:
            yield int(run[0]), run.size
