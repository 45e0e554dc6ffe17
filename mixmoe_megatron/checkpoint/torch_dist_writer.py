"""Write Megatron torch_dist checkpoints without a model or a GPU: tensor by tensor, from one process or several.

Layers of a dense model are stored stacked, see `megatron_checkpoint`, which reads what is written here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.megatron_checkpoint import COMMON_STATE_KEY, LAYER, RELEASE, TRACKER_FILE
from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.checkpoint.streaming import FileView, in_parallel, opened
from mixmoe_megatron.checkpoint.tensors import LazyTensor, split_by_bytes
from mixmoe_megatron.checkpoint.torch_format import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    Size,
    StorageInfo,
    StoredMetadata,
    TensorProperties,
    TensorStorageMetadata,
    dump_metadata,
    write_object,
    write_tensor,
)

CHECKPOINT_VERSION = 3.0
#: How `sharded_state_dict` names and cuts the tensors of a checkpoint that is written here.
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_FILE_BYTES = 1 << 27  # of one .distcp file, about: small enough to share a model among threads and ranks

Places = dict[MetadataIndex, StorageInfo]


def write_torch_dist(
    checkpoint_dir: str | Path,
    plan: list[LazyTensor],
    megatron_args: dict[str, Any],
    stacked_layers: int,
    empty_objects: Collection[str] = (),
    on_bytes: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a `release` checkpoint that Megatron's `--load DIR --finetune` and dist_checkpointing.load accept.

    Which tensors share a file depends on the plan alone, so any number of ranks writes the same bytes.

    Args:
        checkpoint_dir: an existing directory; make it a temporary one (see output_dir.whole_directory).
        plan: tensors by per-layer name, which are written in this order; a few blocks at a time are in memory.
        megatron_args: put into the checkpoint as its `args`.
        stacked_layers: L for a homogeneous (dense) model, whose layers are stored as one tensor; 0 for a Mix-MoE model.
        empty_objects: keys of objects to store as None (`model.extra_state`).
        on_bytes: called with the number of bytes after each block was written.
        ranks: all of them must call this.

    Returns:
        The directory of the iteration.

    Raises:
        OSError: the disk is full, or fails.
    """
    directory = Path(checkpoint_dir) / RELEASE
    ranks.on_first(lambda: directory.mkdir(exist_ok=True))
    files = split_by_bytes(plan, _FILE_BYTES)

    def write_file(number: int) -> Places:
        return _write_tensors(directory / f"__{number}_0.distcp", files[number], stacked_layers, on_bytes)

    def write_mine() -> list[Places]:
        return in_parallel(write_file, ranks.share([sum(t.num_bytes for t in file) for file in files]))

    everywhere = ranks.together(write_mine)

    def finish() -> None:
        objects = {COMMON_STATE_KEY: _common_state(megatron_args), **dict.fromkeys(empty_objects)}
        written = _write_objects(directory / f"__{len(files)}_0.distcp", objects)
        for places in itertools.chain.from_iterable(everywhere):
            written |= places
        _write_metadata(directory, plan, stacked_layers, list(objects), written)
        (Path(checkpoint_dir) / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")

    ranks.on_first(finish)
    return directory


def _common_state(megatron_args: dict[str, Any]) -> dict[str, Any]:
    return {
        "args": argparse.Namespace(**megatron_args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": CONTENT_METADATA,
    }


def _stored_as(tensor: LazyTensor, stacked_layers: int) -> tuple[str, Size, Size, Size]:
    """Return (key, offset, size of this part, size of the whole) under which a tensor is stored."""
    match = LAYER.match(tensor.name)
    if match is None or not stacked_layers:
        return tensor.name, Size([0] * len(tensor.shape)), Size(tensor.shape), Size(tensor.shape)
    offsets = Size([int(match[2]), *[0] * len(tensor.shape)])
    return f"{match[1]}{match[3]}", offsets, Size([1, *tensor.shape]), Size([stacked_layers, *tensor.shape])


def _write_tensors(
    path: Path, tensors: list[LazyTensor], stacked_layers: int, on_bytes: Callable[[int], None]
) -> Places:
    places = Places()
    end = 0
    with opened(path, sum(tensor.num_bytes for tensor in tensors)) as file:
        for tensor in tensors:
            key, offsets, sizes, _ = _stored_as(tensor, stacked_layers)
            view = FileView(file, end)
            write_tensor(view, tensor.dtype, sizes, _told(tensor.blocks(), on_bytes))
            places[MetadataIndex(key, offsets)] = StorageInfo(path.name, end, view.tell())
            end += view.tell()
    return places


def _told(blocks: Iterator[memoryview], on_bytes: Callable[[int], None]) -> Iterator[memoryview]:
    for block in blocks:
        yield block
        on_bytes(len(block))


def _write_objects(path: Path, objects: dict[str, Any]) -> Places:
    places = Places()
    end = 0
    with opened(path) as file:
        for key, value in objects.items():
            view = FileView(file, end)
            write_object(view, [value])
            places[MetadataIndex(key)] = StorageInfo(path.name, end, view.tell())
            end += view.tell()
    return places


def _write_metadata(
    directory: Path, plan: list[LazyTensor], stacked_layers: int, objects: list[str], places: Places
) -> None:
    """Write PyTorch's `.metadata` and Megatron's `metadata.json`, last: without them there is no checkpoint."""
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    indices = [MetadataIndex(key) for key in objects]
    for tensor in plan:
        key, offsets, sizes, size = _stored_as(tensor, stacked_layers)
        entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(tensor.dtype), size))
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        indices.append(MetadataIndex(key, offsets))
    # a pickle tells equal strings from one string: the same bytes, whichever rank a place comes from, need one
    storage = {
        index: StorageInfo(sys.intern(places[index].relative_path), places[index].offset, places[index].length)
        for index in indices
    }
    (directory / ".metadata").write_bytes(dump_metadata(StoredMetadata(entries, storage_data=storage)))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
