"""Turn the mapping tables into a plan: which tensor is made from which, checked in full before any weight is read.

A plan is a list of `LazyTensor`: name, shape and dtype now, the bits of any region when a writer asks for them. So a
conversion holds a block of each of its threads, and the routers, in memory, whatever the model's size.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mixmoe_megatron.checkpoint.bits import FLOAT_DTYPES, ITEMSIZE, Bits, all_finite, as_bytes, from_torch, to_torch
from mixmoe_megatron.checkpoint.stored import Region, in_order, whole
from mixmoe_megatron.conversion.movement import movement
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import Context, Row, Sizes, T

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"keep": None, "fp32": "float32", "bf16": "bfloat16"}
_SHOWN_KEYS = 3
BLOCK_BYTES = 1 << 22  # small enough for a processor's cache, large enough for Python


class Source(Protocol):
    """Tensors by name, of which any region can be read."""

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype in torch."""

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a tensor between start and stop on each axis."""


def read_tensor(source: Source, name: str) -> Tensor:
    """Return all values of a source's tensor. Raises what `read_region` raises."""
    return to_torch(source.read_region(name, whole(source.shape(name))), source.dtype(name))


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


@dataclass(frozen=True)
class Unit:
    """A row of the table at one place: names and shapes are concrete.

    Attributes:
        row: the table's row.
        where: what to call the place in messages, such as `layer 3`.
        megatron: (name, shape) of the row's Megatron tensors that exist.
        hf: (name, shape) of its Hugging Face tensors that exist.
    """

    row: Row
    where: str
    megatron: tuple[tuple[str, tuple[int, ...]], ...]
    hf: tuple[tuple[str, tuple[int, ...]], ...]


def expand(table: Collection[Row], sizes: Sizes) -> list[Unit]:
    """Write out a table for a model, in the model's order.

    Args:
        table: one of `mappings.TABLES`.
        sizes: of the model.
    """

    def concrete(tensors: tuple[T, ...], layer: int | None) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((t.name.replace("{i}", str(layer)), sizes.shape(t.shape)) for t in tensors if sizes.holds(t.when))

    units = []
    moe_layers = set(sizes.moe_layers)
    for row in table:
        if not sizes.holds(row.when):
            continue
        layers: list[int | None] = [None] if row.scope == "model" else list(range(sizes.num_layers))
        for layer in layers:
            if row.scope in ("dense", "moe") and (layer in moe_layers) != (row.scope == "moe"):
                continue
            where = "model" if layer is None else f"layer {layer}"
            units.append(Unit(row, where, concrete(row.megatron, layer), concrete(row.hf, layer)))
    return sorted(units, key=_position)


def _position(unit: Unit) -> int:
    """Sort key: embedding, layers in order, the rest."""
    if unit.where != "model":
        return int(unit.where.split()[1])
    return -1 if unit.megatron[0][0].startswith("embedding.") else 1 << 30


def _keys(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN_KEYS])
    return shown if len(names) <= _SHOWN_KEYS else f"{shown} and {len(names) - _SHOWN_KEYS} more"


def _check_inputs(units: list[Unit], side: str, source: Source, ignored: re.Pattern[str] | None) -> None:
    """Raise if the source's tensors are not exactly the ones that the units read."""
    wanted = {name: shape for unit in units for name, shape in getattr(unit, side)}
    present = {name for name in source.names() if ignored is None or not ignored.search(name)}
    if missing := wanted.keys() - present:
        raise MixMoEError(f"the weights lack {_keys(missing)}.")
    if unused := present - wanted.keys():
        raise MixMoEError(f"the weights hold tensors that no mapping uses: {_keys(unused)}.")
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise MixMoEError(f"{name} has shape {list(source.shape(name))}, the configuration asks for {list(shape)}.")
        check_dtype(name, source.dtype(name))


def check_dtype(name: str, dtype: str) -> None:
    """Raise MixMoEError unless a tensor's dtype is one that weights may have."""
    if dtype not in FLOAT_DTYPES:
        raise MixMoEError(f"{name} has dtype {dtype}, expected float32, bfloat16 or float16.")


def _one_dtype(dtypes: dict[str, str]) -> str:
    """Return the dtype of tensors that are stored as one, by name; raise MixMoEError if they have several."""
    if len(different := set(dtypes.values())) > 1:
        raise MixMoEError(
            f"{', '.join(dtypes)} belong together but differ in dtype: {', '.join(sorted(different))}; convert with "
            "--dtype fp32 or --dtype bf16, which makes them one."
        )
    return different.pop() if different else "float32"


def check_stacks(plan: list[LazyTensor]) -> None:
    """Check that like tensors of all layers have one dtype, as a dense checkpoint stores them in one.

    Raises:
        MixMoEError: they differ; the message names two.
    """
    first: dict[str, LazyTensor] = {}
    for tensor in plan:
        like = first.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", tensor.name), tensor)
        _one_dtype({like.name: like.dtype, tensor.name: tensor.dtype})


class FiniteSource:
    """A source that refuses NaN and infinite values."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region.

        Raises:
            MixMoEError: a value is not finite; the message names the tensor.
        """
        bits = self._source.read_region(name, region)
        if not all_finite(bits, self.dtype(name)):
            raise MixMoEError(f"{name} holds values that are NaN or infinite (--check-finite).")
        return bits


def make_plan(
    units: list[Unit],
    source: Source,
    sizes: Sizes,
    context: Context,
    to: str,
    dtype: str = "keep",
    ignored: re.Pattern[str] | None = None,
    check_finite: bool = False,
) -> list[LazyTensor]:
    """Check the source against the units and return the tensors to write.

    Args:
        units: from `expand`.
        source: tensors of the other side.
        sizes: of the model.
        context: for the layouts that compute.
        to: `megatron` or `hf`.
        dtype: `keep`, `fp32` or `bf16`; routers are never cast.
        ignored: names in the source that carry no weights.
        check_finite: refuse NaN and infinite values where they are read.

    Raises:
        MixMoEError: a key is missing, unused, misshapen or of a surprising dtype; the message names it.
    """
    side = "hf" if to == "megatron" else "megatron"
    _check_inputs(units, side, source, ignored)
    if check_finite:
        source = FiniteSource(source)
    plan = []
    for unit in units:
        names = [name for name, _ in getattr(unit, side)]
        if unit.row.layout.computes == to:
            target = "float32"
            compute = functools.cache(functools.partial(_compute, unit, to, names, source, sizes, context))
        else:
            cast = DTYPES[dtype] if unit.row.cast else None
            target = cast or _one_dtype({name: source.dtype(name) for name in names})
        for position, (name, shape) in enumerate(getattr(unit, to)):
            if unit.row.layout.computes == to:
                read = _computed(compute, position)
            else:
                read = _moved(unit.row, to, position, names, source, sizes, target)
            plan.append(LazyTensor(name, shape, target, read))
    return plan


def _moved(
    row: Row, to: str, position: int, names: list[str], source: Source, sizes: Sizes, dtype: str
) -> Callable[[Region], Bits]:
    moved = movement(row, to, position, sizes)
    return lambda region: moved.read(region, names, dtype, functools.partial(_read_as, dtype, source))


def _compute(unit: Unit, to: str, names: list[str], source: Source, sizes: Sizes, context: Context) -> list[Bits]:
    tensors = [read_tensor(source, name) for name in names]
    results = getattr(unit.row.layout, f"to_{to}")(tensors, sizes, context, unit.where)
    return [from_torch(result) for result in results]


def _computed(compute: Callable[[], list[Bits]], position: int) -> Callable[[Region], Bits]:
    return lambda region: compute()[position][region]


def _read_as(dtype: str, source: Source, name: str, region: Region) -> Bits:
    """Return the bits of a region of a source's tensor as they are in another dtype."""
    bits = source.read_region(name, region)
    if (found := source.dtype(name)) == dtype:
        return bits
    import torch

    return from_torch(to_torch(bits, found).to(getattr(torch, dtype)))


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


def verify_written(plan: list[LazyTensor], written: Source) -> None:
    """Check that what was written, read back from its headers, is what was planned.

    Raises:
        MixMoEError: a tensor is missing or differs in shape or dtype.
    """
    planned = {t.name: (t.shape, t.dtype) for t in plan}
    found = {name: (written.shape(name), written.dtype(name)) for name in written.names()}
    if planned != found:
        name = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))[0]
        raise MixMoEError(f"{name} was not written as planned: {found.get(name)} instead of {planned.get(name)}.")


def describe_plan(plan: list[LazyTensor], destination: str) -> str:
    """Return the plan as a table, one tensor a line, with the total at the end (for --dry-run)."""
    width = max(len(t.name) for t in plan)
    lines = [f"{t.name:<{width}}  {list(t.shape)!s:<24} {t.dtype}" for t in plan]
    total = sum(t.num_bytes for t in plan)
    return "\n".join([*lines, f"{len(plan)} tensors, {total} bytes -> {destination}"])
