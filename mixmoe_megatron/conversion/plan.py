"""Turn the mapping tables into a plan: which tensor is made from which, checked in full before any weight is read.

A plan is a list of `LazyTensor`: name, shape and dtype now, the values when a writer asks for them. So a conversion
holds about one layer's tensors in memory, whatever the model's size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mixmoe_megatron.conversion.mappings import FLOAT_DTYPES, Context, Row, Sizes, T
from mixmoe_megatron.conversion.regions import Region, read_region
from mixmoe_megatron.errors import MixMoEError

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16}
_SHOWN_KEYS = 3


class Source(Protocol):
    """Tensors by name, read one at a time."""

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""

    def read(self, name: str) -> Tensor:
        """Return a tensor's values."""


@runtime_checkable
class SlicedSource(Source, Protocol):
    """A source that reads no more than what it is asked for."""

    def read_region(self, name: str, region: Region) -> Tensor:
        """Return the values of a tensor between start and stop on each axis."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: what it is now, its values when `read` is called.

    Attributes:
        read_region: values of a region, in this tensor's dtype, without reading the rest; None: cut from all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_region: Callable[[Region], Tensor] | None = None

    def part(self, region: Region) -> Tensor:
        """Return the values of a region; what lies beyond the shape is left out.

        Raises:
            MixMoEError: the weights are damaged.
        """
        if self.read_region is None:
            return self.read()[region]
        return self.read_region(
            tuple(slice(*cut.indices(length)[:2]) for cut, length in zip(region, self.shape, strict=True))
        )

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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


class _Conversion:
    """Run one unit when the first of its outputs is asked for; forget each output once it was given."""

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        self._run = run
        self._ready: dict[int, Tensor] = {}

    def take(self, position: int) -> Tensor:
        if position not in self._ready:
            self._ready = dict(enumerate(self._run()))
        return self._ready.pop(position)


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
        if source.dtype(name) not in FLOAT_DTYPES:
            raise MixMoEError(f"{name} has dtype {source.dtype(name)}, expected float32, bfloat16 or float16.")


def _source_dtype(unit: Unit, side: str, source: Source) -> torch.dtype:
    dtypes = {source.dtype(name) for name, _ in getattr(unit, side)}
    if len(dtypes) > 1:
        names = ", ".join(name for name, _ in getattr(unit, side))
        raise MixMoEError(f"{names} belong together but differ in dtype: {', '.join(sorted(map(str, dtypes)))}.")
    return dtypes.pop() if dtypes else torch.float32


def finite_reader(source: Source) -> Callable[[str], Tensor]:
    """Return the source's `read`, which then refuses NaN and infinite values.

    Raises (when called):
        MixMoEError: a value is not finite; the message names the tensor and the number of such values.
    """

    def read(name: str) -> Tensor:
        values = source.read(name)
        if number := 0 if math.isfinite(values.sum(dtype=torch.float32)) else int((~torch.isfinite(values)).sum()):
            raise MixMoEError(f"{name} holds {number} values that are NaN or infinite (--check-finite).")
        return values

    return read


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
        context: for the layouts that need more than tensors.
        to: `megatron` or `hf`.
        dtype: `keep`, `fp32` or `bf16`; routers are never cast.
        ignored: names in the source that carry no weights.
        check_finite: refuse a tensor with NaN or infinite values when it is read.

    Raises:
        MixMoEError: a key is missing, unused, misshapen or of a surprising dtype; the message names it.
    """
    side = "hf" if to == "megatron" else "megatron"
    read = finite_reader(source) if check_finite else source.read
    sliced = source if to == "megatron" and not check_finite and isinstance(source, SlicedSource) else None
    _check_inputs(units, side, source, ignored)
    plan = []
    for unit in units:
        carry = getattr(unit.row.layout, f"to_{to}")
        assert carry is not None, f"this table does not lead to {to}"
        found = _source_dtype(unit, side, source)
        target = (unit.row.cast and DTYPES[dtype]) or found
        if to == "hf" and unit.row.layout.folds:
            target = torch.float32

        def run(unit: Unit = unit, carry=carry) -> list[Tensor]:  # type: ignore[no-untyped-def]
            return carry([read(name) for name, _ in getattr(unit, side)], sizes, context, unit.where)

        conversion = _Conversion(run)
        for position, (name, shape) in enumerate(getattr(unit, to)):
            region = _region_reader(unit, position, sliced, sizes, context, target) if sliced and unit.hf else None
            plan.append(LazyTensor(name, shape, target, _reader(conversion, position, name, shape, target), region))
    return plan


def _region_reader(
    unit: Unit, position: int, source: SlicedSource, sizes: Sizes, context: Context, dtype: torch.dtype
) -> Callable[[Region], Tensor]:
    names = [name for name, _ in unit.hf]

    def read(region: Region) -> Tensor:
        return read_region(unit.row, position, region, names, sizes, context, unit.where, source.read_region).to(dtype)

    return read


def _reader(
    conversion: _Conversion, position: int, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = conversion.take(position).to(dtype).contiguous()
        assert tuple(tensor.shape) == shape, f"{name}: the layout gave {tuple(tensor.shape)}, the table says {shape}"
        return tensor

    return read


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
    lines = [f"{t.name:<{width}}  {list(t.shape)!s:<24} {str(t.dtype).removeprefix('torch.')}" for t in plan]
    total = sum(t.num_bytes for t in plan)
    return "\n".join([*lines, f"{len(plan)} tensors, {total} bytes -> {destination}"])
