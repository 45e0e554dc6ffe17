"""Write Megatron torch_dist checkpoints without a model or a GPU: tensor by tensor, from one process or several.

Layers of a dense model are stored stacked, see `megatron_checkpoint`, which reads what is written here.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import pickle
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mixmoe_megatron.conversion.megatron_checkpoint import COMMON_STATE_KEY, LAYER, RELEASE, TRACKER_FILE
from mixmoe_megatron.conversion.plan import LazyTensor, split_by_bytes
from mixmoe_megatron.conversion.ranks import ALONE, Ranks
from mixmoe_megatron.conversion.streaming import open_to_write, write_all, write_each

CHECKPOINT_VERSION = 3.0
_FILE_BYTES = 1 << 29  # of one .distcp file, about: small enough to share a model among many ranks

Places = dict[MetadataIndex, _StorageInfo]


def write_torch_dist(
    checkpoint_dir: str | Path,
    plan: list[LazyTensor],
    megatron_args: dict[str, Any],
    stacked_layers: int,
    empty_objects: Collection[str] = (),
    on_tensor: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a `release` checkpoint that Megatron's `--load DIR --finetune` and dist_checkpointing.load accept.

    Which tensors share a file depends on the plan alone, so any number of ranks writes the same bytes.

    Args:
        checkpoint_dir: an existing directory; make it a temporary one (see output_dir.whole_directory).
        plan: tensors by per-layer name. They are written in this order, two in memory at a time.
        megatron_args: put into the checkpoint as its `args`.
        stacked_layers: L for a homogeneous (dense) model, whose layers are stored as one tensor; 0 for a Mix-MoE model.
        empty_objects: keys of objects to store as None (mappings.extra_state_keys).
        on_tensor: called with the number of bytes after each tensor was written.
        ranks: all of them must call this.

    Returns:
        The directory of the iteration.

    Raises:
        OSError: the disk is full, or fails.
    """
    directory = Path(checkpoint_dir) / RELEASE
    directory.mkdir(exist_ok=True)
    files = split_by_bytes(plan, _FILE_BYTES)

    def write_mine() -> Places:
        places: Places = {}
        for number in ranks.share([sum(t.num_bytes for t in file) for file in files]):
            places |= _write_tensors(directory / f"__{number}_0.distcp", files[number], stacked_layers, on_tensor)
        return places

    everywhere = ranks.together(write_mine)
    if ranks.rank == 0:
        objects = {COMMON_STATE_KEY: _common_state(megatron_args), **dict.fromkeys(empty_objects)}
        written = _write_objects(directory / f"__{len(files)}_0.distcp", objects)
        for found in everywhere:
            written |= found
        _write_metadata(directory, plan, stacked_layers, list(objects), written)
        (Path(checkpoint_dir) / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
    return directory


def _common_state(megatron_args: dict[str, Any]) -> dict[str, Any]:
    return {
        "args": argparse.Namespace(**megatron_args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _stored_as(tensor: LazyTensor, stacked_layers: int) -> tuple[str, torch.Size, torch.Size, torch.Size]:
    """Return (key, offset, size of this part, size of the whole) under which a tensor is stored."""
    match = LAYER.match(tensor.name)
    if match is None or not stacked_layers:
        return tensor.name, torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape), torch.Size(tensor.shape)
    offsets = torch.Size([int(match[2]), *[0] * len(tensor.shape)])
    key = f"{match[1]}{match[3]}"
    return key, offsets, torch.Size([1, *tensor.shape]), torch.Size([stacked_layers, *tensor.shape])


class _Stream(io.RawIOBase):
    """A file for torch.save, which hides the OSError of a full disk behind a RuntimeError of its own."""

    def __init__(self, file: io.FileIO, name: str) -> None:
        self.file, self.name = file, name
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        try:
            return write_all(self.file, data)
        except OSError as error:
            self.error = error
            raise

    def save(self, value: Any, index: MetadataIndex, places: Places) -> None:
        """Append a value and note its place.

        Raises:
            OSError: the disk is full, or fails.
        """
        start = self.file.tell()
        try:
            torch.save(value, cast(IO[bytes], self))
        except RuntimeError:
            raise self.error or RuntimeError(f"torch cannot save {index.fqn}") from None
        places[index] = _StorageInfo(self.name, start, self.file.tell() - start)


def _write_tensors(
    path: Path, tensors: list[LazyTensor], stacked_layers: int, on_tensor: Callable[[int], None]
) -> Places:
    places = Places()
    with open_to_write(path) as file:
        stream = _Stream(file, path.name)

        def write(tensor: LazyTensor, values: Tensor) -> None:
            key, offsets, sizes, _ = _stored_as(tensor, stacked_layers)
            own = values.clone() if _is_view(values) else values
            stream.save(own.reshape(sizes), MetadataIndex(key, offsets), places)
            gc.collect(1)  # torch.save leaves a reference cycle that holds the values
            on_tensor(tensor.num_bytes)

        write_each(tensors, write)
    return places


def _is_view(values: Tensor) -> bool:
    """Whether the tensor shares a larger storage, all of which torch.save would write."""
    return values.untyped_storage().nbytes() != values.nbytes


def _write_objects(path: Path, objects: dict[str, Any]) -> Places:
    places = Places()
    with open_to_write(path) as file:
        stream = _Stream(file, path.name)
        for key, value in objects.items():
            stream.save([value], MetadataIndex(key), places)
    return places


def _write_metadata(
    directory: Path, plan: list[LazyTensor], stacked_layers: int, objects: list[str], places: Places
) -> None:
    """Write PyTorch's `.metadata` and Megatron's `metadata.json`, last: without them there is no checkpoint."""
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    indices = [MetadataIndex(key) for key in objects]
    for tensor in plan:
        key, offsets, sizes, whole = _stored_as(tensor, stacked_layers)
        entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), whole, []))
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        indices.append(MetadataIndex(key, offsets))
    # a pickle tells equal strings from one string: the same bytes, whichever rank a place comes from, need one
    storage = {
        index: _StorageInfo(sys.intern(places[index].relative_path), places[index].offset, places[index].length)
        for index in indices
    }
    metadata = Metadata(state_dict_metadata=entries, storage_data=storage, version=CURRENT_DCP_VERSION)
    with (directory / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
