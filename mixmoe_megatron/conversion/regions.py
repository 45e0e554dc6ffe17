"""A region of a Megatron tensor from the slices of the Hugging Face tensors that make it. Torch only.

A layout moves slices along the axes in which the two sides of a row differ, and leaves the axes that they share as they
are. Which slice goes where the layout tells itself: it is run on the slices' numbers in place of their values. So the
mapping tables stay the one place that knows, and nothing but the slices is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mixmoe_megatron.conversion.mappings import Context, Row, Sizes, T

Region = tuple[slice, ...]
Axes = list[str]  # the symbols of a tensor's axes


def read_region(
    row: Row,
    position: int,
    region: Region,
    names: Sequence[str],
    sizes: Sizes,
    context: Context,
    where: str,
    read: Callable[[str, Region], Tensor],
) -> Tensor:
    """Return a region of a row's Megatron tensor: that part of what its layout gives.

    Args:
        row: of a table, with at least one Hugging Face tensor; its layout moves values and makes zeros, no more.
        position: of the tensor among the row's existing Megatron tensors.
        region: start and stop on each axis, within the tensor.
        names: of the row's existing Hugging Face tensors.
        sizes: of the model.
        context: for the layout.
        where: for the layout.
        read: values of a region of a Hugging Face tensor by name; all of the same dtype.

    Returns:
        The region's values, not necessarily contiguous.
    """
    sources, target = _axes(row.hf, sizes), _axes(row.megatron, sizes)[position]
    shared = set(target).intersection(*sources)
    if shared == set(target):  # nothing moves: the first axis may as well
        shared.remove(target[0])
    cut = dict(zip(target, region, strict=True))
    numbers, firsts = _slice_numbers(row, position, sources, shared, sizes, context, where)
    numbers = numbers[tuple(slice(None) if symbol in shared else cut[symbol] for symbol in target)]
    order, count = sources[0], numbers.numel()  # all sources have their axes in the same order
    (axis,) = (axis for axis, symbol in enumerate(order) if symbol not in shared)
    lengths = [cut[symbol].stop - cut[symbol].start if symbol in shared else count for symbol in order]
    values, done = None, 0
    for first, length in _runs(numbers.flatten().tolist()):
        if first:
            source = bisect_right(firsts, first) - 1
            slices = slice(first - firsts[source], first - firsts[source] + length)
            part = read(names[source], tuple(cut[s] if s in shared else slices for s in sources[source]))
            if length == count:
                values = part
            else:
                values = torch.zeros(lengths, dtype=part.dtype) if values is None else values
                values.narrow(axis, done, length).copy_(part)
        done += length
    values = torch.zeros(lengths) if values is None else values
    moved = [symbol for symbol in target if symbol not in shared]
    values = values.movedim(axis, 0).unflatten(0, [numbers.shape[target.index(symbol)] for symbol in moved])
    found = [*moved, *(symbol for symbol in order if symbol in shared)]
    return values.permute([found.index(symbol) for symbol in target])


def _axes(tensors: Sequence[T], sizes: Sizes) -> list[Axes]:
    """Return the axes of each existing tensor."""
    return [tensor.shape.split() for tensor in tensors if sizes.holds(tensor.when)]


def _slice_numbers(
    row: Row, position: int, sources: list[Axes], shared: set[str], sizes: Sizes, context: Context, where: str
) -> tuple[Tensor, list[int]]:
    """Run a layout on the numbers of slices, shared axes shrunk to 1.

    Returns:
        The slices' numbers in the Megatron tensor, int64, 0 where the layout makes zeros; and each source's first
        number. A number lies free before each source, so that no run goes on from one into the next.
    """
    assert row.layout.to_megatron is not None
    shapes = [[1 if symbol in shared else sizes.shape(symbol)[0] for symbol in axes] for axes in sources]
    counts = [torch.Size(shape).numel() for shape in shapes]
    firsts = list(accumulate((count + 1 for count in counts[:-1]), initial=2))
    numbers = [
        torch.arange(first, first + count).view(shape)
        for first, count, shape in zip(firsts, counts, shapes, strict=True)
    ]
    return row.layout.to_megatron(numbers, sizes, context, where)[position], firsts


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield first number and length of each run that counts up by one."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield numbers[start], end - start
            start = end
