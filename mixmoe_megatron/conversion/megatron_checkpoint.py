"""Read and write Megatron torch_dist checkpoints from one process, without a model, a process group or a GPU.

A torch_dist checkpoint is a PyTorch distributed checkpoint plus Megatron's `metadata.json` and a `common_state` object.
Tensors are stored under global keys. A dense model's layers are stacked: `decoder.layers.mlp...` [L, ...]. One whose
`moe_layer_freq` is a list has one key a layer: `decoder.layers.3.mlp...`. Here every tensor goes by its per-layer name,
and this module knows how it is stored.

Nothing is unpickled except through an allow-list of PyTorch's metadata classes; tensors are read with `weights_only`.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mixmoe_megatron.conversion.plan import LazyTensor
from mixmoe_megatron.errors import MixMoEError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
CHECKPOINT_VERSION = 3.0
_COMMON_STATE_KEY = "common_state/shard_0_1"
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.*)")
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


class _SafeReader(FileSystemReader):
    """PyTorch's reader, with its bare pickle.load of `.metadata` replaced."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as stream:
                return _MetadataUnpickler(stream).load()
        except FileNotFoundError:
            raise MixMoEError(f"{self.path} is not a torch_dist checkpoint: .metadata is missing.") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
            raise MixMoEError(f"{path} cannot be read ({error}).") from None


class _SlicePlanner(LoadPlanner):
    """Read one rectangular part of one stored tensor into `target`."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self.target[region]

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> LoadPlan:
        """Not used: the plan is made by `TorchDistReader.read`."""
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plan as it is: there is one process."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse objects: only tensors are asked for."""
        raise AssertionError("a tensor read asked for an object")

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave a view of the target."""


class TorchDistReader:
    """Model tensors of one iteration of a torch_dist checkpoint, by per-layer name, whatever layout it was saved under.

    Optimizer state, random states, common state and Transformer Engine's `_extra_state` are left out.

    Args:
        directory: of one iteration (see `iteration_directory`).

    Raises:
        MixMoEError: it is not a torch_dist checkpoint, or its metadata cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self._reader = _SafeReader(directory)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._tensors: dict[str, tuple[str, int | None, TensorStorageMetadata]] = {}
        for key, info in stored.items():
            if NOT_WEIGHTS.match(key) or key.endswith("_extra_state"):
                continue
            if key.startswith("decoder.layers.") and not _LAYER.match(key):
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
        target = torch.empty(lengths, dtype=info.properties.dtype)
        items = create_read_items_for_chunk_list(key, info, [ChunkStorageMetadata(offsets, lengths)])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != target.numel():
            raise MixMoEError(f"the checkpoint does not hold all of {name} ({covered} of {target.numel()} values).")
        try:
            self._reader.read_data(LoadPlan(items), _SlicePlanner(target)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
            raise MixMoEError(f"{name} cannot be read from {self._reader.path} ({error}).") from None
        return target if layer is None else target[0]


class _StreamingPlanner(DefaultSavePlanner):
    """Write tensors one at a time: each is made when its turn comes, and dropped once it is written."""

    def __init__(
        self,
        plan: list[LazyTensor],
        stacked_layers: int,
        objects: dict[str, Any],
        on_tensor: Callable[[int], None],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._objects = objects
        self._on_tensor = on_tensor
        self._by_index: dict[MetadataIndex, LazyTensor] = {}
        self._items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in objects]
        for tensor in plan:
            key, offsets, sizes, whole = _stored_as(tensor, stacked_layers)
            index = MetadataIndex(key, offsets)
            self._by_index[index] = tensor
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=tensor.dtype), whole)
            self._items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        """Return the plan made from the mapping table; no state dict is looked at."""
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make the values of one item."""
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], stream)
            return stream
        assert write_item.tensor_data is not None
        tensor = self._by_index[write_item.index]
        values = tensor.read().reshape(write_item.tensor_data.chunk.sizes)
        self._on_tensor(tensor.num_bytes)
        return values


def _stored_as(tensor: LazyTensor, stacked_layers: int) -> tuple[str, torch.Size, torch.Size, torch.Size]:
    """Return (key, offset, size of this part, size of the whole) under which a tensor is stored."""
    match = _LAYER.match(tensor.name)
    if match is None or not stacked_layers:
        return tensor.name, torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape), torch.Size(tensor.shape)
    offsets = torch.Size([int(match[2]), *[0] * len(tensor.shape)])
    key = f"{match[1]}{match[3]}"
    return key, offsets, torch.Size([1, *tensor.shape]), torch.Size([stacked_layers, *tensor.shape])


def write_torch_dist(
    checkpoint_dir: str | Path,
    plan: list[LazyTensor],
    megatron_args: dict[str, Any],
    stacked_layers: int,
    empty_objects: Collection[str] = (),
    on_tensor: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write a `release` checkpoint that Megatron's `--load DIR --finetune` and dist_checkpointing.load accept.

    Args:
        checkpoint_dir: an existing directory; make it a temporary one (see output_dir.whole_directory).
        plan: tensors by per-layer name. They are written in this order, one in memory at a time.
        megatron_args: put into the checkpoint as its `args`.
        stacked_layers: L for a homogeneous (dense) model, whose layers are stored as one tensor; 0 for a Mix-MoE model.
        empty_objects: keys of objects to store as None (mappings.extra_state_keys).
        on_tensor: called with the number of bytes after each tensor was made.

    Returns:
        The directory of the iteration.
    """
    directory = Path(checkpoint_dir) / RELEASE
    directory.mkdir()
    common = {
        "args": argparse.Namespace(**megatron_args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    objects = {_COMMON_STATE_KEY: common, **dict.fromkeys(empty_objects)}
    planner = _StreamingPlanner(plan, stacked_layers, objects, on_tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is meant, and PyTorch warns about its own TypedStorage
        dcp.save({}, storage_writer=FileSystemWriter(directory), planner=planner, no_dist=True)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
    (Path(checkpoint_dir) / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
    return directory


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
        text = tracker.read_text(encoding="utf-8").strip()
        if text != RELEASE and not text.isdigit():
            raise MixMoEError(f"{tracker} holds {text!r}, expected a number or 'release'.")
        directory = root / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    else:
        directory = root / f"iter_{iteration:07d}"
    if not directory.is_dir():
        raise MixMoEError(f"{directory} does not exist.")
    return directory
