"""Read Megatron torch_dist checkpoints from one process, without a model, a process group or a GPU.

A torch_dist checkpoint is a PyTorch distributed checkpoint plus Megatron's `metadata.json` and a `common_state` object.
Tensors are stored under global keys. A dense model's layers are stacked: `decoder.layers.mlp...` [L, ...]. One whose
`moe_layer_freq` is a list has one key a layer: `decoder.layers.3.mlp...`. Here every tensor goes by its per-layer name,
and this module knows how it is stored.

Nothing is unpickled except through an allow-list of PyTorch's metadata classes; tensors are read with `weights_only`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from mixmoe_megatron.errors import MixMoEError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
COMMON_STATE_KEY = "common_state/shard_0_1"
LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.*)")
NOT_WEIGHTS = re.compile(r"^(optimizer|opt_param_scheduler|rng_state|rerun_state|chained_)")
_SAFE_CLASS_MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "planner", "filesystem"))
_SAFE_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickle `.metadata`: classes of PyTorch's distributed checkpoint and torch dtypes, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module == "torch" or module in _SAFE_CLASS_MODULES else None
        if (module in _SAFE_CLASS_MODULES and isinstance(found, type)) or isinstance(found, torch.dtype):
            return found
        if (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")


def _read_metadata(directory: Path) -> Metadata:
    path = directory / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise MixMoEError(f"{directory} is not a torch_dist checkpoint: .metadata is missing.") from None
    except Exception as error:  # there is hardly an exception that damaged bytes cannot raise
        raise MixMoEError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None
    if not isinstance(metadata, Metadata):
        raise MixMoEError(f"{path} cannot be read (it holds a {type(metadata).__name__}).")
    return metadata


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
    except (AttributeError, TypeError, ValueError) as error:
        raise MixMoEError(f"{Path(directory) / '.metadata'} cannot be read ({error}).") from None


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
        self._tensors: dict[str, tuple[str, int | None, TensorStorageMetadata]] = {}
        try:
            self._places = metadata.storage_data or {}
            for key, info in metadata.state_dict_metadata.items():
                if isinstance(info, TensorStorageMetadata) and not _is_beside_the_weights(key):
                    self._add(key, info)
            parts = {(key, chunk.offsets) for key, _, info in self._tensors.values() for chunk in info.chunks}
            places = [(key, self._places[MetadataIndex(key, offsets)]) for key, offsets in parts]
            check_files(self._directory, [StoredEntry(k, p.relative_path, p.offset, p.length) for k, p in places])
        except MixMoEError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MixMoEError(f"{self._directory / '.metadata'} contradicts itself ({error!r}).") from None

    def _add(self, key: str, info: TensorStorageMetadata) -> None:
        if key.startswith("decoder.layers.") and not LAYER.match(key):
            rest = key.removeprefix("decoder.layers.")
            for layer in range(info.size[0]):
                self._tensors[f"decoder.layers.{layer}.{rest}"] = (key, layer, info)
        else:
            self._tensors[key] = (key, None, info)

    def names(self) -> Collection[str]:
        """Return the per-layer names of all model tensors."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without the layer axis."""
        _, layer, info = self._tensors[name]
        return tuple(info.size if layer is None else info.size[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._tensors[name][2].properties.dtype

    def read(self, name: str) -> Tensor:
        """Return a tensor's values, put together from however many shards.

        Raises:
            MixMoEError: a shard's file is missing or damaged.
        """
        key, layer, info = self._tensors[name]
        first = 0 if layer is None else layer
        offsets = torch.Size([first, *[0] * (len(info.size) - 1)])
        lengths = torch.Size(info.size if layer is None else [1, *info.size[1:]])
        items = create_read_items_for_chunk_list(key, info, [ChunkStorageMetadata(offsets, lengths)])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != lengths.numel():
            raise MixMoEError(f"the checkpoint does not hold all of {name} ({covered} of {lengths.numel()} values).")
        whole = None
        for item in items:
            part = self._read_part(name, item.storage_index, info.properties.dtype)
            try:
                part = part[_region(item.storage_offsets, item.lengths)]
                if len(items) == 1:
                    whole = part.reshape(lengths)
                    break
                whole = torch.empty(lengths, dtype=part.dtype) if whole is None else whole
                whole[_region(item.dest_offsets, item.lengths)] = part
            except (RuntimeError, IndexError, ValueError):
                raise MixMoEError(f"{name} has another shape in {self._directory} than .metadata says.") from None
        assert whole is not None
        return whole if layer is None else whole[0]

    def _read_part(self, name: str, index: MetadataIndex, dtype: torch.dtype) -> Tensor:
        info = self._places[index]
        path = self._directory / info.relative_path
        try:
            with path.open("rb") as stream:
                view = cast(IO[bytes], _create_file_view(stream, info.offset, info.length))
                part = torch.load(view, "cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise MixMoEError(f"{name} cannot be read from {path} ({reason}).") from None
        if not isinstance(part, Tensor) or part.dtype != dtype:
            raise MixMoEError(f"{name} cannot be read from {path} (it holds something else there).")
        return part


def _region(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


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
        if text != RELEASE and not text.isdecimal():
            raise MixMoEError(f"{tracker} holds {text!r}, expected a number or 'release'.")
        directory = root / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    else:
        directory = root / f"iter_{iteration:07d}"
    if not directory.is_dir():
        raise MixMoEError(f"{directory} does not exist.")
    return directory
