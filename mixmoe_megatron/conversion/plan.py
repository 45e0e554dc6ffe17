"""Turn the mapping tables into a plan: which tensor is made from which, checked in full before any weight is read.

A plan is a list of `LazyTensor`: name, shape and dtype now, the bits of any region when a writer asks for them. So a
conversion holds a block of each of its threads, and the routers, in memory, whatever the model's size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from mixmoe_megatron.checkpoint.bits import FLOAT_DTYPES, Bits, all_finite, from_float32, to_float32
from mixmoe_megatron.checkpoint.stored import Region, whole
from mixmoe_megatron.checkpoint.tensors import LazyTensor, TensorSource
from mixmoe_megatron.conversion.movement import Movement, movement
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import Row, Side, Sizes
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.router_rows import folded_router

DTYPES = {"keep": None, "fp32": "float32", "bf16": "bfloat16"}
_SHOWN_KEYS = 3


Tensors = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Unit:
    """A row of the table at one place: names and shapes are concrete.

    Attributes:
        row: the table's row.
        layer: 0-based number of the layer; None: the row occurs once in the model.
        megatron: (name, shape) of the row's Megatron tensors that exist.
        hf: (name, shape) of its Hugging Face tensors that exist.
    """

    row: Row
    layer: int | None
    megatron: Tensors
    hf: Tensors

    def tensors(self, side: Side) -> Tensors:
        """Return (name, shape) of the tensors of a side."""
        return self.hf if side == "hf" else self.megatron


def expand(table: Collection[Row], sizes: Sizes) -> list[Unit]:
    """Write out a table for a model, in the model's order.

    Args:
        table: one of `mapping.TABLES`.
        sizes: of the model.
    """
    units = []
    for row in (row for row in table if row.when(sizes)):
        for layer in [None] if row.scope == "model" else sizes.layers(row.scope):
            megatron, hf = (
                tuple((key.name.replace("{i}", str(layer)), sizes.shape(key.shape)) for key in row.keys(side, sizes))
                for side in ("megatron", "hf")
            )
            units.append(Unit(row, layer, megatron, hf))
    return sorted(units, key=_position)


def _position(unit: Unit) -> int:
    """Sort key: embedding, layers in order, the rest."""
    if unit.layer is not None:
        return unit.layer
    return -1 if unit.megatron[0][0].startswith("embedding.") else 1 << 30


def _keys(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN_KEYS])
    return shown if len(names) <= _SHOWN_KEYS else f"{shown} and {len(names) - _SHOWN_KEYS} more"


def _check_inputs(units: list[Unit], side: Side, source: TensorSource, ignored: re.Pattern[str] | None) -> None:
    """Raise if the source's tensors are not exactly the ones that the units read."""
    wanted = {name: shape for unit in units for name, shape in unit.tensors(side)}
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

    def __init__(self, source: TensorSource) -> None:
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


@dataclass(frozen=True)
class Target:
    """What a plan is to lead to.

    Attributes:
        side: `megatron` or `hf`.
        dtype: `keep`, `fp32` or `bf16`; routers are never cast.
        options: of a Mix-MoE model, whose routers are folded on the way to Hugging Face.
        seed: of the router weights drawn where a dense model is upcycled.
        check_finite: refuse NaN and infinite values where they are read.
    """

    side: Side
    dtype: str = "keep"
    options: MixMoEOptions | None = None
    seed: int = 0
    check_finite: bool = False


def plan_tensors(
    units: list[Unit], source: TensorSource, sizes: Sizes, target: Target, ignored: re.Pattern[str] | None = None
) -> list[LazyTensor]:
    """Check the source against the units and return the tensors to write.

    Args:
        units: from `expand`.
        source: tensors of the other side.
        sizes: of the model.
        target: what to make of them.
        ignored: names in the source that carry no weights.

    Raises:
        MixMoEError: a key is missing, unused, misshapen or of a surprising dtype; the message names it.
    """
    _check_inputs(units, "hf" if target.side == "megatron" else "megatron", source, ignored)
    if target.check_finite:
        source = FiniteSource(source)
    plan: list[LazyTensor] = []
    for unit in units:
        moves = unit.row.crossing.to_hf if target.side == "hf" else unit.row.crossing.to_megatron
        plan += (_computed if moves is None else _moved)(unit, source, sizes, target)
    return plan


def _computed(unit: Unit, source: TensorSource, sizes: Sizes, target: Target) -> Iterator[LazyTensor]:
    """Yield the tensors of a unit whose values are computed, in float32: folded routers, and what is new."""
    for name, shape in unit.tensors(target.side):
        if target.side == "hf":
            assert target.options is not None
            groups = [name for name, _ in unit.megatron]
            compute = functools.partial(_folded, groups, source, target.options)
        else:
            assert unit.row.crossing.new is not None, "what does not move is computed"
            compute = functools.partial(unit.row.crossing.new, name, shape, sizes, target.seed)
        yield LazyTensor(name, shape, "float32", functools.partial(_part_of, functools.cache(compute)))


def _folded(names: list[str], source: TensorSource, options: MixMoEOptions) -> Bits:
    weights = [to_float32(source.read_region(n, whole(source.shape(n))), source.dtype(n)) for n in names]
    return folded_router(weights, options)


def _part_of(compute: Callable[[], Bits], region: Region) -> Bits:
    return from_float32(compute(), "float32")[region]


def _moved(unit: Unit, source: TensorSource, sizes: Sizes, target: Target) -> Iterator[LazyTensor]:
    """Yield the tensors of a unit whose values come from the other side as they are, or in another dtype."""
    names = [name for name, _ in (unit.megatron if target.side == "hf" else unit.hf)]
    if unit.row.is_router and target.side == "hf":  # training in bfloat16 leaves biases in bfloat16
        dtype = "float32"
    else:
        cast = None if unit.row.is_router else DTYPES[target.dtype]
        dtype = cast or _one_dtype({name: source.dtype(name) for name in names})
    for position, (name, shape) in enumerate(unit.tensors(target.side)):
        moved = movement(unit.row, target.side, position, sizes)
        yield LazyTensor(name, shape, dtype, functools.partial(_read_moved, moved, names, source, dtype))


def _read_moved(moved: Movement, names: list[str], source: TensorSource, dtype: str, region: Region) -> Bits:
    return moved.read(region, names, dtype, functools.partial(_read_as, dtype, source))


def _read_as(dtype: str, source: TensorSource, name: str, region: Region) -> Bits:
    """Return the bits of a region of a source's tensor as they are in another dtype."""
    bits = source.read_region(name, region)
    if (found := source.dtype(name)) == dtype:
        return bits
    return from_float32(to_float32(bits, found), dtype)


def describe_tensors(plan: list[LazyTensor], destination: str) -> str:
    """Return the plan as a table, one tensor a line, with the total at the end (for --dry-run)."""
    width = max(len(t.name) for t in plan)
    lines = [f"{t.name:<{width}}  {list(t.shape)!s:<24} {t.dtype}" for t in plan]
    total = sum(t.num_bytes for t in plan)
    return "\n".join([*lines, f"{len(plan)} tensors, {total} bytes -> {destination}"])
