"""The weights of a dense model with the neurons of some FFNs in another order, to be cut into experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.tensors import TensorSource

_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")


class RegroupedSource:
    """A source in which row i of a layer's gate and up projections, and column i of its down projection, is neuron i.

    Args:
        source: of a dense model of the Llama or Qwen2 family.
        neurons: by layer, [F] integers: which neuron stands at each place. A neuron may stand at several.
    """

    def __init__(self, source: TensorSource, neurons: Mapping[int, np.ndarray[Any, Any]]) -> None:
        self._source, self._neurons = source, neurons
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region. What lies between its neurons is read as well. Raises what the source raises."""
        found = _FFN.fullmatch(name)
        if found is None or int(found[1]) not in self._neurons:
            return self._source.read_region(name, region)
        axis = 1 if found[2] == "down" else 0
        wanted = self._neurons[int(found[1])][region[axis]]
        first, last = wanted.min(), wanted.max()
        cuts = [slice(first, last + 1) if place == axis else cut for place, cut in enumerate(region)]
        return np.take(self._source.read_region(name, tuple(cuts)), wanted - first, axis)
