"""Read and write Hugging Face weights as safetensors, a tensor at a time. Pickled weights (.bin) are never opened."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixmoe_megatron.conversion.plan import LazyTensor
from mixmoe_megatron.errors import MixMoEError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Return a size such as `5GB`, `200MB` or `1000` in bytes.

    Raises:
        MixMoEError: not a positive number with an optional unit KB, MB or GB.
    """
    match = re.fullmatch(r"(\d+)\s*([KMG]?B?)", text.strip().upper())
    if match is None or match[2] == "B" or (match[2] and match[2] not in _UNITS) or int(match[1]) == 0:
        raise MixMoEError(f"{text!r} is not a size; write for example 5GB or 200MB.")
    return int(match[1]) * _UNITS[match[2]]


class SafetensorsReader:
    """Tensors of a Hugging Face directory by name, from `model.safetensors` or the files that its index names.

    Opening reads headers only. A file is memory-mapped; `read` copies one tensor.

    Raises:
        MixMoEError: no safetensors weights, an unreadable or truncated file, or an index that names a missing file,
            a file outside the directory, or a tensor that the file lacks.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        if not self._directory.is_dir():
            raise MixMoEError(f"{directory} is not a directory.")
        if (self._directory / INDEX_FILE).is_file():
            self._open_index()
        elif (self._directory / SINGLE_FILE).is_file():
            self._where = dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            pickled = any(self._directory.glob("*.bin")) or any(self._directory.glob("*.pt*"))
            hint = "; pickled weights (.bin, .pt) are not read, save them as safetensors first" if pickled else ""
            raise MixMoEError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}.")

    def _open(self, name: str) -> Any:
        path = self._directory / name
        if not path.is_file():
            raise MixMoEError(f"{INDEX_FILE} names {name}, which is missing.")
        try:
            self._files[name] = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise MixMoEError(f"{path} is not a whole safetensors file ({error}).") from None
        return self._files[name]

    def _open_index(self) -> None:
        path = self._directory / INDEX_FILE
        try:
            where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            self._where = {str(name): str(file) for name, file in where.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise MixMoEError(f"{path} is not a safetensors index (JSON with a weight_map).") from None
        for file in sorted(set(self._where.values())):
            if Path(file).name != file:
                raise MixMoEError(f"{INDEX_FILE} names {file!r}, which is not a file of this directory.")
            held = set(self._open(file).keys())
            listed = {name for name, where_ in self._where.items() if where_ == file}
            if held != listed:
                name = sorted(held ^ listed)[0]
                raise MixMoEError(f"{INDEX_FILE} and {file} disagree about {name}.")

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._where.keys()

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, from the header.

        Raises:
            MixMoEError: torch has no such dtype.
        """
        text = self._slice(name).get_dtype()
        if text not in _DTYPES:
            raise MixMoEError(f"{name} has dtype {text}, which is not supported.")
        return _DTYPES[text]

    def read(self, name: str) -> Tensor:
        """Return a tensor's values."""
        return self._files[self._where[name]].get_tensor(name)


def _assign_files(plan: list[LazyTensor], max_shard_bytes: int) -> list[list[LazyTensor]]:
    """Fill shards in the plan's order; a tensor larger than a shard gets one of its own."""
    shards: list[list[LazyTensor]] = [[]]
    used = 0
    for tensor in plan:
        if shards[-1] and used + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    return shards


def write_safetensors(
    directory: str | Path,
    plan: list[LazyTensor],
    max_shard_bytes: int,
    on_tensor: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Write tensors as `model.safetensors`, or as several shards with an index. At most one shard is in memory.

    Args:
        directory: an existing directory; make it a temporary one (see output_dir.whole_directory).
        plan: what to write, in order.
        max_shard_bytes: largest shard, in bytes.
        on_tensor: called with the number of bytes after each tensor was made.

    Returns:
        The names of the files written.
    """
    directory = Path(directory)
    shards = _assign_files(plan, max_shard_bytes)
    one = len(shards) == 1
    names = [
        SINGLE_FILE if one else f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)
    ]
    for file, shard in zip(names, shards, strict=True):
        values = {}
        for tensor in shard:
            values[tensor.name] = tensor.read()
            on_tensor(tensor.num_bytes)
        save_file(values, str(directory / file), metadata={"format": "pt"})
        (directory / file).chmod(0o644)
    if one:
        return names
    weight_map = {t.name: file for file, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": sum(t.num_bytes for t in plan)}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*names, INDEX_FILE]
