"""Read and write Hugging Face weights as safetensors, a tensor at a time. Pickled weights (.bin) are never opened."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixmoe_megatron.conversion.hf_files import own_file
from mixmoe_megatron.conversion.plan import LazyTensor, split_by_bytes
from mixmoe_megatron.conversion.ranks import ALONE, Ranks
from mixmoe_megatron.conversion.regions import Region
from mixmoe_megatron.conversion.streaming import open_to_write, write_all, write_each
from mixmoe_megatron.errors import MixMoEError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LENGTH_BYTES = 8  # a file begins with the length of its header


def parse_size(text: str) -> int:
    """Return a size such as `5GB`, `200MB` or `1000` in bytes.

    Raises:
        MixMoEError: not a positive number with an optional unit KB, MB or GB.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]?B?)", text.strip().upper())
    if match is None or match[2] == "B" or (match[2] and match[2] not in _UNITS) or int(match[1]) == 0:
        raise MixMoEError(f"{text!r} is not a size; write for example 5GB or 200MB.")
    return int(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: its file, the position of its first byte, and what a header says about it."""

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return found


def _read_header(path: Path) -> dict[str, _Entry]:
    """Return the tensors of a file. The library checks sizes, overlaps and holes; it lets a name occur twice."""
    try:
        with safe_open(str(path), framework="pt", device="cpu"):
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise MixMoEError(f"{path} is not a whole safetensors file ({error}).") from None
    first = _LENGTH_BYTES + length
    return {
        name: _Entry(path, first + info["data_offsets"][0], info["dtype"], tuple(info["shape"]))
        for name, info in header.items()
        if name != "__metadata__"
    }


class SafetensorsReader:
    """Tensors of a Hugging Face directory by name, from `model.safetensors` or the files that its index names.

    Opening reads headers only, `read` one tensor, `read_region` a part of one. Files are not mapped into memory: mapped
    pages would count as memory of this process, and a file that became shorter would kill it.

    Raises:
        MixMoEError: no safetensors weights, an unreadable or truncated file, or an index that names a missing file,
            a file outside the directory, or a tensor that the file lacks.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._entries: dict[str, _Entry] = {}
        if not self._directory.is_dir():
            raise MixMoEError(f"{directory} is not a directory.")
        if (self._directory / INDEX_FILE).is_file():
            self._open_index()
        elif (self._directory / SINGLE_FILE).is_file():
            self._entries = _read_header(own_file(self._directory, SINGLE_FILE))
        else:
            pickled = any(self._directory.glob("*.bin")) or any(self._directory.glob("*.pt*"))
            hint = (
                "; pickled weights (.bin, .pt) are never opened, a pickle can run any code: if you trust it, load the "
                "model with transformers and save it again, which writes safetensors"
            )
            raise MixMoEError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint if pickled else ''}.")

    def _open_index(self) -> None:
        path = self._directory / INDEX_FILE
        try:
            where = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
            where = {str(name): str(file) for name, file in where.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MixMoEError(f"{path} is not a safetensors index (JSON with a weight_map, no name twice).") from None
        for file in sorted(set(where.values())):
            held = _read_header(own_file(self._directory, file))
            listed = {name for name, where_ in where.items() if where_ == file}
            if held.keys() != listed:
                name = sorted(held.keys() ^ listed)[0]
                raise MixMoEError(f"{INDEX_FILE} and {file} disagree about {name}.")
            self._entries.update(held)

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, from the header.

        Raises:
            MixMoEError: torch has no such dtype.
        """
        text = self._entries[name].dtype
        if text not in _DTYPES:
            raise MixMoEError(f"{name} has dtype {text}, which is not supported.")
        return _DTYPES[text]

    def read(self, name: str) -> Tensor:
        """Return a tensor's values. Raises as `read_region`."""
        return self.read_region(name, tuple(slice(0, length) for length in self.shape(name)))

    def read_region(self, name: str, region: Region) -> Tensor:
        """Return the values of a tensor between start and stop on each axis, and read no byte beside them.

        Where they lie in many pieces (columns of a matrix) the kernel hears of all before the first is read, so that a
        disk need not be waited for piece by piece.

        Raises:
            MixMoEError: the file cannot be read, or has become shorter.
        """
        entry = self._entries[name]
        values = torch.empty([cut.stop - cut.start for cut in region], dtype=self.dtype(name))
        starts, size = _pieces(entry.shape, region, values.itemsize)
        rest = memoryview(values.view(-1).view(torch.uint8).numpy())
        try:
            with entry.path.open("rb", buffering=0) as stream:
                if len(starts) > 1:
                    for start in starts:
                        os.posix_fadvise(stream.fileno(), entry.start + start, size, os.POSIX_FADV_WILLNEED)
                for start in starts:
                    rest = self._read_piece(stream.fileno(), entry.start + start, rest, size)
        except OSError as error:
            raise MixMoEError(f"{name} cannot be read from {entry.path} ({error}).") from None
        return values

    def _read_piece(self, file: int, position: int, into: memoryview, size: int) -> memoryview:
        """Fill the first `size` bytes of a buffer from a file, and return the rest of the buffer."""
        done = 0
        while done < size:
            read = os.preadv(file, [into[done:size]], position + done)
            if not read:
                raise OSError("it ends too early")
            done += read
        return into[size:]


def _pieces(shape: tuple[int, ...], region: Region, itemsize: int) -> tuple[list[int], int]:
    """Return where the contiguous pieces of a region begin, in bytes from the tensor's start, and the size of each."""
    starts, size, stride, is_cut = [0], itemsize, itemsize, False
    for length, cut in zip(reversed(shape), reversed(region), strict=True):
        if is_cut:
            starts = [index * stride + start for index in range(cut.start, cut.stop) for start in starts]
        else:
            starts, size = [cut.start * stride], (cut.stop - cut.start) * stride
            is_cut = cut.stop - cut.start < length
        stride *= length
    return starts, size


@dataclass(frozen=True)
class _Shard:
    """A file to write: its name, its header's bytes, and the position of each tensor's first byte."""

    file: str
    header: bytes
    starts: dict[str, int]
    size: int


def _layout(file: str, tensors: list[LazyTensor]) -> _Shard:
    """Settle the places of a file's tensors: the wider dtypes first, so that every tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
        offsets = [end, end := end + tensor.num_bytes]
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets,
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = _LENGTH_BYTES + len(text)
    starts = {t.name: first + header[t.name]["data_offsets"][0] for t in tensors}
    return _Shard(file, len(text).to_bytes(_LENGTH_BYTES, "little") + text, starts, first + end)


def write_safetensors(
    directory: str | Path,
    plan: list[LazyTensor],
    max_shard_bytes: int,
    on_tensor: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Write tensors as `model.safetensors`, or as several shards with an index. Two tensors at a time are in memory.

    Several ranks write into the same files, each its share of the tensors: every place is known beforehand.

    Args:
        directory: an existing directory; make it a temporary one (see output_dir.whole_directory).
        plan: what to write, in order.
        max_shard_bytes: largest shard, in bytes.
        on_tensor: called with the number of bytes after each tensor was written.
        ranks: all of them must call this.

    Returns:
        The names of the files written.
    """
    directory = Path(directory)
    groups = split_by_bytes(plan, max_shard_bytes)
    one = len(groups) == 1
    names = [
        SINGLE_FILE if one else f"model-{k:05d}-of-{len(groups):05d}.safetensors" for k in range(1, len(groups) + 1)
    ]
    shards = [_layout(file, tensors) for file, tensors in zip(names, groups, strict=True)]
    shard_of = {name: shard for shard in shards for name in shard.starts}
    mine = [plan[k] for k in ranks.share([t.num_bytes for t in plan])]

    def write_mine() -> None:
        for shard in shards:
            tensors = [t for t in mine if shard_of[t.name] is shard]
            if tensors or ranks.rank == 0:
                _write_share(directory / shard.file, shard, tensors, ranks.rank == 0, on_tensor)

    ranks.together(write_mine)
    if one:
        return names
    if ranks.rank == 0:
        weight_map = {name: shard.file for name, shard in sorted(shard_of.items())}
        index = {"metadata": {"total_size": sum(t.num_bytes for t in plan)}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX_FILE]


def _write_share(
    path: Path, shard: _Shard, tensors: list[LazyTensor], with_header: bool, on_tensor: Callable[[int], None]
) -> None:
    with open_to_write(path) as file:
        if with_header:
            write_all(file, shard.header)
            os.truncate(path, shard.size)

        def write(tensor: LazyTensor, values: Tensor) -> None:
            write_all(file, values.view(-1).view(torch.uint8).numpy(), shard.starts[tensor.name])
            on_tensor(tensor.num_bytes)

        write_each(tensors, write)
