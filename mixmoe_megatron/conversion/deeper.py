"""The weights of a dense model with copies of some blocks between its blocks, as LLaMA-Pro starts.

Source: LLaMA Pro (arXiv:2401.02415) section 3: what a copy would add to the hidden states is zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, bits_type
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.tensors import TensorSource
from mixmoe_megatron.methods.llama_pro import copied_blocks

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
#: projections whose outputs are added to the hidden states
_ADDED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def new_layers(copied: Sequence[int]) -> tuple[int, ...]:
    """Return the 0-based numbers that the copies of blocks have in the deeper model; each stands behind its block."""
    return tuple(block + place + 1 for place, block in enumerate(sorted(copied)))


def deeper_config(config: dict[str, Any], copied: Sequence[int]) -> dict[str, Any]:
    """Return config.json of a dense model with so many more layers.

    Args:
        config: of the base.
        copied: 0-based numbers of the blocks that are copied.
    """
    deeper = {**config, "num_hidden_layers": config["num_hidden_layers"] + len(copied)}
    if kinds := config.get("layer_types"):
        deeper["layer_types"] = [kind for i, kind in enumerate(kinds) for _ in range(1 + (i in copied))]
    return deeper


def with_new_blocks(config: dict[str, Any], new_blocks: int | None) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return config.json of a dense model with so many blocks more, and the 0-based numbers of the new layers.

    Args:
        config: of the base.
        new_blocks: P; None: one for each `BLOCKS_A_COPY` of the base.

    Raises:
        MixMoEError: there cannot be so many.
    """
    copied = copied_blocks(config["num_hidden_layers"], new_blocks)
    return deeper_config(config, copied), new_layers(copied)


class DeeperSource:
    """A source of the deeper model's tensors.

    Args:
        source: of a dense model of the Llama or Qwen2 family.
        new: 0-based numbers of the new layers, each a copy of the base's block before it.
        num_layers: of the deeper model.
    """

    def __init__(self, source: TensorSource, new: Sequence[int], num_layers: int) -> None:
        self._source, self._new = source, set(new)
        #: the base's block for each layer of the deeper model
        self._blocks = [layer - sum(number <= layer for number in new) for layer in range(num_layers)]

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        names = []
        for name in self._source.names():
            if found := _LAYER.fullmatch(name):
                layers = [layer for layer, block in enumerate(self._blocks) if block == int(found[1])]
                # a layer that the base should not have keeps its name, to be told of
                names += [f"model.layers.{layer}.{found[2]}" for layer in layers] or [f"{name} (beyond the last layer)"]
            else:
                names.append(name)
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._source.shape(self._original(name)[0])

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype."""
        return self._source.dtype(self._original(name)[0])

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region. Raises what the source raises."""
        original, is_zero = self._original(name)
        if is_zero:
            lengths = [part.stop - part.start for part in region]
            return np.zeros(lengths, bits_type(self._source.dtype(original)))
        return self._source.read_region(original, region)

    def _original(self, name: str) -> tuple[str, bool]:
        """Return the base's tensor, and whether zeros stand in its place."""
        found = _LAYER.fullmatch(name)
        if found is None or int(found[1]) >= len(self._blocks):
            return name, False
        layer = int(found[1])
        return f"model.layers.{self._blocks[layer]}.{found[2]}", layer in self._new and found[2] in _ADDED
