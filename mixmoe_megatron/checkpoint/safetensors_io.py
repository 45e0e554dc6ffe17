"""Read and write Hugging Face weights as safetensors. Pickled weights (.bin) are never opened."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mixmoe_megatron.checkpoint.bits import ITEMSIZE, Bits
from mixmoe_megatron.checkpoint.hf_files import own_file
from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.checkpoint.stored import Region, StoredTensor
from mixmoe_megatron.checkpoint.streaming import FileView, in_parallel, opened
from mixmoe_megatron.checkpoint.tensors import LazyTensor, split_by_bytes
from mixmoe_megatron.errors import MixMoEError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file. The library checks sizes, overlaps and holes; it lets a name occur twice."""
    try:
        with safe_open(str(path), framework="np"):
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise MixMoEError(f"{path} is not a whole safetensors file ({error}).") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        dtype = _DTYPES.get(info["dtype"], info["dtype"])  # one that torch lacks keeps its name, to be refused by it
        start = _LENGTH_BYTES + length + info["data_offsets"][0]
        tensors[name] = StoredTensor(path, start, dtype, tuple(info["shape"]))
    return tensors


class SafetensorsReader:
    """Tensors of a Hugging Face directory by name, from `model.safetensors` or the files that its index names.

    Where both lie, transformers takes the single file, and so does this.

    Opening reads headers only. Files are not mapped into memory: mapped pages would count as memory of this process,
    and a file that became shorter would kill it.

    Args:
        directory: with the files.
        single_file: the name of the one file, where it is not the usual one.

    Raises:
        MixMoEError: no safetensors weights, an unreadable or truncated file, or an index that names a missing file,
            a file outside the directory, or a tensor that the file lacks.
    """

    def __init__(self, directory: str | Path, single_file: str = SINGLE_FILE) -> None:
        self._directory = Path(directory)
        self._entries: dict[str, StoredTensor] = {}
        if not self._directory.is_dir():
            raise MixMoEError(f"{directory} is not a directory.")
        if (self._directory / single_file).is_file():
            self._entries = _read_header(own_file(self._directory, single_file))
        elif (self._directory / INDEX_FILE).is_file():
            self._open_index()
        else:
            raise MixMoEError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{self._what_else()}.")

    def _what_else(self) -> str:
        """What to say of weights that are there under other names."""
        for name in (SINGLE_FILE, INDEX_FILE):
            if (self._directory / name).is_symlink():
                own_file(self._directory, name)  # says where the link leads
        if others := sorted(path.name for path in self._directory.glob("*.safetensors*")):
            return f", the names that are read, but {others[0]}: rename it if it holds the model"
        if any(self._directory.glob("*.bin")) or any(self._directory.glob("*.pt*")):
            return (
                "; pickled weights (.bin, .pt) are never opened, a pickle can run any code: if you trust it, load the "
                "model with transformers and save it again, which writes safetensors"
            )
        return ""

    def _open_index(self) -> None:
        path = own_file(self._directory, INDEX_FILE)
        try:
            where = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
            where = {str(name): str(file) for name, file in where.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype in torch, from the header."""
        return self._entries[name].dtype

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a tensor between start and stop on each axis, and read no byte beside them.

        Raises:
            MixMoEError: the file cannot be read, or has become shorter.
        """
        entry = self._entries[name]
        try:
            return entry.read(region)
        except OSError as error:
            raise MixMoEError(f"{name} cannot be read from {entry.path} ({error}).") from None


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
    for tensor in sorted(tensors, key=lambda t: -ITEMSIZE[t.dtype]):
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
    on_bytes: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Write tensors as `model.safetensors`, or as several shards with an index; a few blocks at a time are in memory.

    Several threads and ranks write into the same files, each its share of the tensors: every place is known beforehand.

    Args:
        directory: an existing directory; make it a temporary one (see output_dir.whole_directory).
        plan: what to write, in order.
        max_shard_bytes: largest shard, in bytes.
        on_bytes: called with the number of bytes after each block was written.
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

    def write_tensor(tensor: LazyTensor) -> None:
        shard = shard_of[tensor.name]
        with opened(directory / shard.file) as file:
            view = FileView(file, shard.starts[tensor.name])
            for block in tensor.blocks():
                on_bytes(view.write(block))

    def write_headers() -> None:
        for shard in shards:
            with opened(directory / shard.file, shard.size) as file:
                FileView(file, 0).write(shard.header)

    ranks.on_first(write_headers)  # before all else: where a disk can't take room, zeros are written there
    ranks.together(lambda: in_parallel(write_tensor, mine))
    if one:
        return names
    weight_map = {name: shard.file for name, shard in sorted(shard_of.items())}
    index = {"metadata": {"total_size": sum(t.num_bytes for t in plan)}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    ranks.on_first(lambda: (directory / INDEX_FILE).write_text(text, encoding="utf-8"))
    return [*names, INDEX_FILE]
