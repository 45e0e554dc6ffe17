"""The weights of a dense model with some FFNs as text has them: neurons in another order, to be cut into experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, from_float32
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.tensors import TensorSource

_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class RegroupedFFN:
    """A dense FFN whose neurons stand in another order, with a down projection for it.

    Attributes:
        neurons: [F] integers, which neuron stands at each place. One may stand at several.
        down: [H, F] float32, the down projection with its columns in that order.
    """

    neurons: np.ndarray[Any, Any]
    down: np.ndarray[Any, Any]


class RegroupedSource:
    """A source in which row i of some layers' gate and up projections is neuron i of theirs, and which has their down.

    Args:
        source: of a dense model of the Llama or Qwen2 family.
        ffns: by layer.
    """

    def __init__(self, source: TensorSource, ffns: Mapping[int, RegroupedFFN]) -> None:
        self._source, self._ffns = source, ffns
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region. What lies between its neurons is read as well. Raises what the source raises."""
        found = _FFN.fullmatch(name)
        if found is None or int(found[1]) not in self._ffns:
            return self._source.read_region(name, region)
        ffn = self._ffns[int(found[1])]
        if found[2] == "down":
            return from_float32(np.ascontiguousarray(ffn.down[region]), self.dtype(name))
        wanted = ffn.neurons[region[0]]
        first, last = wanted.min(), wanted.max()
        return np.take(self._source.read_region(name, (slice(first, last + 1), *region[1:])), wanted - first, 0)
