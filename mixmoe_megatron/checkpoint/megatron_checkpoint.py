"""Read Megatron torch_dist checkpoints from one process, without a model, a process group or a GPU.

A torch_dist checkpoint is a PyTorch distributed checkpoint plus Megatron's `metadata.json` and a `common_state` object.
Tensors are stored under global keys. A dense model's layers are stacked: `decoder.layers.mlp...` [L, ...]. One whose
`moe_layer_freq` is a list has one key a layer: `decoder.layers.3.mlp...`. Here every tensor goes by its per-layer name,
and this module knows how it is stored.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, bits_type
from mixmoe_megatron.checkpoint.stored import Region, StoredTensor, lengths, overlap, shifted
from mixmoe_megatron.checkpoint.torch_format import (
    MetadataIndex,
    StorageInfo,
    StoredMetadata,
    TensorStorageMetadata,
    find_tensor,
    load_metadata,
)
from mixmoe_megatron.errors import MixMoEError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
COMMON_STATE_KEY = "common_state/shard_0_1"
EMBEDDING = "embedding.word_embeddings.weight"
MOST_LAYERS = 10_000  # more than any model has, few enough for a list
_MOST_DIGITS = 18
LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.*)")
NOT_WEIGHTS = re.compile(r"^(optimizer|opt_param_scheduler|rng_state|rerun_state|chained_)")


def _read_metadata(directory: Path) -> StoredMetadata:
    path = directory / ".metadata"
    try:
        return load_metadata(path)
    except FileNotFoundError:
        raise MixMoEError(f"{directory} is not a torch_dist checkpoint: .metadata is missing.") from None
    except Exception as error:  # there is hardly an exception that damaged bytes cannot raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MixMoEError(f"{path} cannot be read ({reason}).") from None


class StoredEntry(NamedTuple):
    """Where one tensor shard or object of a checkpoint lies: a file of its directory, and bytes of that file."""

    key: str
    file: str
    offset: int
    length: int


def stored_entries(directory: str | Path) -> list[StoredEntry]:
    """Return where `.metadata` says that the entries of an iteration lie; nothing else is read.

    Raises:
        MixMoEError: `.metadata` is missing or cannot be read.
    """
    metadata = _read_metadata(Path(directory))
    try:
        return [
            StoredEntry(index.fqn, str(place.relative_path), int(place.offset), int(place.length))
            for index, place in metadata.storage_data.items()
        ]
    except Exception as error:
        raise MixMoEError(f"{Path(directory) / '.metadata'} cannot be read ({error!r}).") from None


def check_files(directory: Path, entries: Iterable[StoredEntry]) -> None:
    """Check that every entry lies inside an existing file of a directory; compares sizes, reads nothing.

    Raises:
        MixMoEError: it does not.
    """
    sizes: dict[str, int] = {}
    for key, file, offset, length in sorted(entries, key=lambda entry: (entry.file, entry.offset)):
        if Path(file).name != file:
            raise MixMoEError(f".metadata names {file!r}, which is not a file of {directory}.")
        if file not in sizes:
            if not (directory / file).is_file():
                raise MixMoEError(f"{directory} lacks {file}, which holds {key}.")
            sizes[file] = (directory / file).stat().st_size
        if offset < 0 or length < 0 or offset + length > sizes[file]:
            needed = f"{sizes[file]} bytes, {offset + length} are needed"
            raise MixMoEError(f"{directory / file} is truncated: it ends before {key} ({needed}).")


def _is_beside_the_weights(key: str) -> bool:
    return NOT_WEIGHTS.match(key) is not None or key.endswith("_extra_state")


class _Part(NamedTuple):
    """A part in which a tensor is stored: its region of the tensor, and its archive."""

    region: Region
    place: StoredEntry


class _Tensor(NamedTuple):
    """A tensor of `.metadata`, layers included; `layer` is the one that is meant, None where they are not stacked."""

    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    parts: list[_Part]


class TorchDistReader:
    """Model tensors of one iteration of a torch_dist checkpoint, by per-layer name, whatever layout it was saved under.

    Optimizer state, random states, common state and Transformer Engine's `_extra_state` are left out.

    Args:
        directory: of one iteration (see `iteration_directory`).

    Raises:
        MixMoEError: it is not a torch_dist checkpoint, or its metadata cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        metadata = _read_metadata(self._directory)
        self._tensors: dict[str, _Tensor] = {}
        self._stored: dict[StoredEntry, StoredTensor] = {}
        try:
            for key, info in metadata.state_dict_metadata.items():
                if isinstance(info, TensorStorageMetadata) and not _is_beside_the_weights(key):
                    self._add(key, info, metadata.storage_data)
            check_files(self._directory, {part.place for tensor in self._tensors.values() for part in tensor.parts})
        except MixMoEError:
            raise
        except Exception as error:  # there is hardly an exception that a damaged structure cannot raise
            raise MixMoEError(f"{self._directory / '.metadata'} contradicts itself ({error!r}).") from None

    def _add(self, key: str, info: TensorStorageMetadata, places: dict[MetadataIndex, StorageInfo]) -> None:
        shape = tuple(map(operator.index, info.size))
        parts = []
        for chunk in info.chunks:
            starts, sizes = map(operator.index, chunk.offsets), map(operator.index, chunk.sizes)
            region = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
            if len(region) != len(shape):
                raise ValueError(f"a part of {key} has {len(region)} axes")
            place = places[MetadataIndex(key, chunk.offsets)]
            parts.append(_Part(region, StoredEntry(key, place.relative_path, place.offset, place.length)))
        tensor = _Tensor(None, shape, str(info.properties.dtype), parts)
        if key.startswith("decoder.layers.") and not LAYER.match(key):
            if shape[0] > MOST_LAYERS:
                raise ValueError(f"{key} has {shape[0]} layers")
            for layer in range(shape[0]):
                name = f"decoder.layers.{layer}.{key.removeprefix('decoder.layers.')}"
                self._tensors[name] = tensor._replace(layer=layer)
        else:
            self._tensors[key] = tensor

    def names(self) -> Collection[str]:
        """Return the per-layer names of all model tensors."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without the layer axis."""
        tensor = self._tensors[name]
        return tensor.shape if tensor.layer is None else tensor.shape[1:]

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype in torch."""
        return self._tensors[name].dtype

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region, put together from however many parts the tensor is stored in.

        Raises:
            MixMoEError: a part is missing or damaged.
        """
        tensor = self._tensors[name]
        wanted = region if tensor.layer is None else (slice(tensor.layer, tensor.layer + 1), *region)
        values, found = np.empty(lengths(wanted), bits_type(tensor.dtype)), 0
        for part in tensor.parts:
            shared = overlap(wanted, part.region)
            if shared is None:
                continue
            bits = self._read_part(name, part, tensor.dtype, shifted(shared, part.region))
            found += bits.size
            if shared == wanted:
                values = bits
                break
            values[shifted(shared, wanted)] = bits
        if found != values.size:
            raise MixMoEError(f"the checkpoint does not hold all of {name} ({found} of {values.size} values).")
        return values if tensor.layer is None else values[0, ...]

    def _read_part(self, name: str, part: _Part, dtype: str, region: Region) -> Bits:
        """Return a region of a part; where its values lie is looked up once."""
        place = part.place
        path = self._directory / place.file
        try:
            if place not in self._stored:
                stored = find_tensor(path, place.offset, place.length)
                if (stored.shape, stored.dtype) != (lengths(part.region), dtype):
                    raise ValueError(f"it holds {stored.dtype} of shape {list(stored.shape)} there")
                self._stored[place] = stored
            return self._stored[place].read(region)
        except Exception as error:  # there is hardly an exception that damaged bytes cannot raise
            raise MixMoEError(f"{name} cannot be read from {path} ({error}).") from None


def vocabulary_rows(reader: TorchDistReader, directory: Path) -> int:
    """Return the rows of the word embedding of a checkpoint, padding included.

    Args:
        reader: of one iteration.
        directory: of it, for the message.

    Raises:
        MixMoEError: there is none.
    """
    if EMBEDDING not in reader.names() or len(reader.shape(EMBEDDING)) != 2:
        raise MixMoEError(f"{directory} has no {EMBEDDING}: it is not a checkpoint of a language model.")
    return reader.shape(EMBEDDING)[0]


def iteration_directory(checkpoint_dir: str | Path, iteration: int | None = None) -> Path:
    """Return the directory of an iteration: the given one, or the one that the tracker file names.

    Raises:
        MixMoEError: the tracker file is missing or senseless, or the iteration is not there.
    """
    root = Path(checkpoint_dir)
    if not root.is_dir():
        raise MixMoEError(f"{checkpoint_dir} is not a directory.")
    if iteration is None:
        tracker = root / TRACKER_FILE
        if not tracker.is_file():
            raise MixMoEError(
                f"{checkpoint_dir} has no {TRACKER_FILE}: it is not a Megatron checkpoint, or saving was interrupted."
            )
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text != RELEASE and not (text.isdecimal() and len(text) <= _MOST_DIGITS):
            raise MixMoEError(f"{tracker} holds {text[:40]!r}, expected a number or 'release'.")
        directory = root / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    else:
        directory = root / f"iter_{iteration:07d}"
    if not directory.is_dir():
        raise MixMoEError(f"{directory} does not exist.")
    return directory
