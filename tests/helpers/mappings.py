"""What the tests of the mapping tables share: sizes of tiny models, and tensors in memory as a source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mixmoe_megatron.checkpoint.bits import Bits, from_torch, to_torch
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader
from mixmoe_megatron.checkpoint.stored import Region, whole
from mixmoe_megatron.checkpoint.tensors import LazyTensor, TensorSource
from mixmoe_megatron.conversion.plan import expand
from mixmoe_megatron.model.mapping import TABLES, Sizes
from mixmoe_megatron.model.options import MixMoEOptions

DENSE = Sizes(
    num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, kv_channels=3,
    vocab_size=10, padded_vocab_size=16, tied=False, qkv_bias=True,
)  # fmt: skip
MOE = replace(DENSE, moe_layers=(1,), num_groups=2, num_experts_per_group=2, moe_ffn_hidden_size=6)
OPTIONS = MixMoEOptions(num_experts_per_group=2)


class Memory:
    """Tensors in memory as a source."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype."""
        return dtype_name(self.tensors[name].dtype)

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region."""
        return from_torch(self.tensors[name])[region]


class CountedMemory(Memory):
    """Tensors in memory; the values read are counted."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.values_read = 0

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region, which lies within the tensor."""
        bits = super().read_region(name, region)
        assert bits.shape == tuple(cut.stop - cut.start for cut in region)
        self.values_read += bits.size
        return bits


def read_tensor(source: TensorSource, name: str) -> Tensor:
    """Return all values of a source's tensor."""
    return to_torch(source.read_region(name, whole(source.shape(name))), source.dtype(name))


def checkpoint_of(directory: Path) -> dict[str, Tensor]:
    """Return all weights of one iteration of a checkpoint."""
    reader = TorchDistReader(directory)
    return {name: read_tensor(reader, name) for name in reader.names()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def lazy(name: str, tensor: Tensor) -> LazyTensor:
    """Return a tensor as one of a plan."""
    bits = from_torch(tensor)
    return LazyTensor(name, tuple(tensor.shape), dtype_name(tensor.dtype), lambda region: bits[region])


def values(tensor: LazyTensor) -> Tensor:
    """Return all values of a tensor of a plan."""
    return tensor.part(tuple(slice(0, length) for length in tensor.shape))


def random_hf(sizes: Sizes, dtype: torch.dtype = torch.float32) -> Memory:
    """Return the random weights of a Hugging Face model of these sizes."""
    return Memory({n: torch.randn(s).to(dtype) for unit in expand(TABLES["same"], sizes) for n, s in unit.hf})
