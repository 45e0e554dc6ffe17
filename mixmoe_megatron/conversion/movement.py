"""A region of a tensor from the slices of the other side's tensors that make it, for crossings that only move values.

A crossing moves slices along the axes in which the two sides of a row differ, and leaves the axes that they share as
they are. Which slice goes where the crossing tells itself: it is run on the slices' numbers in place of their values.
So the mapping tables stay the one place that knows, and nothing but the slices is read.

For example, gate [2, H] and up [2, H] of a tiny FFN become experts [2, 2, H], two slices of one row each: expert e has
row e of gate, then row e of up. H is shared. The rows are numbered, with a number left free before each tensor, and the
crossing is run on the numbers:

    gate  2     up  5      ->   experts  [[2, 5],     expert 0: row 0 of gate, row 0 of up
          3         6                     [3, 6]]     expert 1: row 1 of gate, row 1 of up

Read in the order of memory, 2 5 3 6 are four runs of one row: four reads of H values each, or of as many columns of
them as the region asks for. Of expert 0 alone, 2 5 are two reads. A stack of gate and up is 2 3 5 6, two reads of two
rows each: that is why a number lies free between them, or 2 3 4 5 would pass for one run of one tensor. Where a
crossing puts zeros, such as rows of vocabulary padding, it leaves the number 0, and nothing is read.
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
from mixmoe_megatron.model.mapping import Row, Side, Sizes


class Movement:
    """Where the values of one tensor of a row come from. `movement` makes these, once for all layers.

    Args:
        row: of a table; its crossing to that side moves values and makes zeros, no more.
        to: the tensor's side.
        position: of the tensor among the row's existing tensors of its side.
        sizes: of the model.
    """

    def __init__(self, row: Row, to: Side, position: int, sizes: Sizes) -> None:
        other: Side = "hf" if to == "megatron" else "megatron"
        self._axes = row.keys(to, sizes)[position].shape.split()  # their symbols
        self._source_axes = [key.shape.split() for key in row.keys(other, sizes)]
        shared = set(self._axes).intersection(*self._source_axes)
        if not self._source_axes:  # zeros
            shared = set()
        elif shared == set(self._axes):  # nothing moves: the first axis may as well
            shared.remove(self._axes[0])
        self._moved = set(self._axes).union(*self._source_axes) - shared
        shapes = [[sizes.shape(s)[0] if s in self._moved else 1 for s in symbols] for symbols in self._source_axes]
        self._moved_shapes = [
            [sizes.shape(symbol)[0] for symbol in symbols if symbol in self._moved] for symbols in self._source_axes
        ]
        # The first is 2: 1 lies free, so that no run begins among zeros and goes on into values.
        *firsts, _ = accumulate((math.prod(shape) + 1 for shape in shapes), initial=2)
        self._firsts = firsts
        numbers = [np.arange(f, f + math.prod(shape)).reshape(shape) for f, shape in zip(firsts, shapes, strict=True)]
        move = row.crossing.to_hf if to == "hf" else row.crossing.to_megatron
        assert move is not None, "what is computed does not move"
        self._numbers: Bits = move(numbers, sizes)[position]

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
        shared = [symbol for symbol in order if symbol not in self._moved]
        # what moves lies together, in one axis or several, or is a source as a whole
        axis = next((place for place, symbol in enumerate(order) if symbol in self._moved), 0)
        shape = [cut[symbol].stop - cut[symbol].start for symbol in shared]
        shape.insert(axis, count)
        reads = [part for first, length in _runs(numbers) for part in self._parts(first, length)]
        if len(reads) == 1 and reads[0][0]:
            values = read(*self._place(*reads[0], names, cut)).reshape(shape)
        else:
            values, done = np.zeros(shape, bits_type(dtype)), 0
            for first, length in reads:
                if first:
                    part = values[(*[slice(None)] * axis, slice(done, done + length))]
                    part[...] = read(*self._place(first, length, names, cut)).reshape(part.shape)
                done += length
        moved = [symbol for symbol in self._axes if symbol in self._moved]
        lengths = [numbers.shape[self._axes.index(symbol)] for symbol in moved]
        values = values.reshape(*values.shape[:axis], *lengths, *values.shape[axis + 1 :])
        found = [*shared[:axis], *moved, *shared[axis:]]
        return values.transpose([found.index(symbol) for symbol in self._axes])

    def _parts(self, first: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut a run of numbers where one slice of a source's first moved axis ends, if several axes of it move."""
        if not first:
            yield first, length
            return
        source = bisect_right(self._firsts, first) - 1
        row = self._moved_shapes[source][-1] if len(self._moved_shapes[source]) > 1 else length
        start = first - self._firsts[source]
        while length:
            part = min(length, row - start % row)
            yield self._firsts[source] + start, part
            start, length = start + part, length - part

    def _place(self, first: int, length: int, names: Sequence[str], cut: dict[str, slice]) -> tuple[str, Region]:
        """Return the tensor and region of so many slices from a number on."""
        source = bisect_right(self._firsts, first) - 1
        start = first - self._firsts[source]
        places: list[slice] = []
        for size in reversed(self._moved_shapes[source]):
            start, place = divmod(start, size)
            places.append(slice(place, place + (1 if places else length)))
        return names[source], tuple(places.pop() if s in self._moved else cut[s] for s in self._source_axes[source])


movement = lru_cache(maxsize=256)(Movement)


def _runs(numbers: Bits) -> Iterator[tuple[int, int]]:
    """Yield first number and length of each run that counts up by one, in the order of memory."""
    flat = numbers.reshape(-1)
    for run in np.split(flat, np.flatnonzero(np.diff(flat) != 1) + 1):
        if run.size:
            yield int(run[0]), run.size
