"""Which weights these are: one hash over all tensors, the same however they are cut into files or saved in parallel."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection

import numpy as np
import xxhash

from mixmoe_megatron.checkpoint.bits import ITEMSIZE, Bits, as_bytes
from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.checkpoint.stored import Region, in_order, pieces
from mixmoe_megatron.checkpoint.streaming import in_parallel
from mixmoe_megatron.checkpoint.tensors import BLOCK_BYTES, TensorSource


class HashedSource:
    """A source whose tensors are hashed while they are read, in order, with the bytes still in the cache.

    XXH128 tells weights apart as surely as SHA-256 as long as nobody forges them, and costs next to nothing.

    Args:
        source: of the tensors.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.shape, self.dtype = source.shape, source.dtype
        self._hashes = {name: _Hash() for name in source.names()}

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._hashes.keys()

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region. Raises what the source raises."""
        bits = self._source.read_region(name, region)
        starts, size = pieces(self.shape(name), region)
        if len(starts) == 1:
            self._hashes[name].take(starts[0], size, bits)
        return bits

    def weights_digest(self, ranks: Ranks = ALONE) -> str:
        """Read what has not been read in order yet, and return the hash of all.

        Args:
            ranks: those that each read a share through an object of their own; all of them must call this.

        Returns:
            32 hexadecimal digits: of the lines `NAME DTYPE SHAPE DIGEST`, sorted.

        Raises:
            MixMoEError: what the source raises.
        """
        known = {name: digest for found in ranks.together(self._complete) for name, digest in found.items()}
        rest = [name for name in sorted(self.names()) if name not in known]
        mine = [rest[k] for k in ranks.share([math.prod(self.shape(name)) for name in rest])]
        for found in ranks.together(lambda: dict(zip(mine, in_parallel(self._read_rest, mine), strict=True))):
            known |= found
        lines = [f"{name} {self.dtype(name)} {list(self.shape(name))} {known[name]}\n" for name in sorted(known)]
        return xxhash.xxh128("".join(lines).encode()).hexdigest()

    def _complete(self) -> dict[str, str]:
        """Return the digests of the tensors of which every value has been read."""
        return {name: one.digest() for name, one in self._hashes.items() if one.count == math.prod(self.shape(name))}

    def _read_rest(self, name: str) -> str:
        shape, one = self.shape(name), self._hashes[name]
        for region in in_order(shape, BLOCK_BYTES // ITEMSIZE[self.dtype(name)]):
            (start,), size = pieces(shape, region)
            if start + size > one.count:
                bits = np.ascontiguousarray(self._source.read_region(name, region)).reshape(-1)
                one.take(one.count, start + size - one.count, bits[one.count - start :])
        return one.digest()


def weights_xxh128(source: TensorSource) -> str:
    """Return the fingerprint of all tensors of a source, see `HashedSource.weights_digest`."""
    return HashedSource(source).weights_digest()


class _Hash:
    """Of the first values of a tensor, which may be read by several threads and more than once."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = xxhash.xxh128()
        self._lock = threading.Lock()

    def take(self, start: int, size: int, bits: Bits) -> None:
        """Add values if they are the next ones."""
        with self._lock:
            if start == self.count:
                self._hash.update(as_bytes(bits))
                self.count += size

    def digest(self) -> str:
        return self._hash.hexdigest()
