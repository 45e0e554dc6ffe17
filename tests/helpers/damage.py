"""Ways to damage a model directory or a checkpoint, for the tests of broken and hostile input."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixmoe_megatron.checkpoint.metadata import read_metadata, write_metadata

Damage = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
SHARD = "release/__0_0.distcp"


def config(**fields: Any) -> Damage:
    """Change fields of config.json."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of the one weight file."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        edit(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return damage


def header(edit: Callable[[dict[str, Any]], object] | None = None, text: Callable[[str], str] = str) -> Damage:
    """Change the header of the one weight file and leave its values."""

    def damage(directory: Path) -> None:
        data = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        if edit is not None:
            edit(found)
        new = text(json.dumps(found)).encode()
        (directory / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return damage


def index(edit: Callable[[dict[str, str], Path], object]) -> Damage:
    """Change the weight map of a model in several files."""

    def damage(directory: Path) -> None:
        found = json.loads((directory / INDEX).read_text())
        edit(found["weight_map"], directory)
        (directory / INDEX).write_text(json.dumps(found))

    return damage


def moved_out(as_named: Callable[[Path], str]) -> Damage:
    """Move a weight file out of the directory and name it in the index where it is."""

    def edit(where: dict[str, str], directory: Path) -> None:
        file = where[Q]
        outside = directory.parent / file
        shutil.move(directory / file, outside)
        where.update({name: as_named(outside) for name, value in where.items() if value == file})

    return index(edit)


def linked_out(name: str) -> Damage:
    """Put a file outside of the directory and a link to it in its place."""

    def damage(directory: Path) -> None:
        outside = directory.parent / "outside"
        if (directory / name).exists():
            shutil.move(directory / name, outside)
        else:
            outside.write_text("{}")
        (directory / name).symlink_to(outside)

    return damage


def dangling(name: str) -> Damage:
    """Put a link to a file that is missing in a file's place."""

    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("nowhere")

    return damage


def adapter_alone(directory: Path) -> None:
    """Leave what peft saves of an adapter."""
    (directory / "config.json").rename(directory / "adapter_config.json")
    (directory / WEIGHTS).rename(directory / "adapter_model.safetensors")


def metadata_fields(**fields: Any) -> Damage:
    """Change fields of mixmoe_metadata.json; those of `megatron_args` and `hf_config` are merged."""

    def damage(directory: Path) -> None:
        metadata = read_metadata(directory)
        for name, value in fields.items():
            merged = name in ("megatron_args", "hf_config")
            setattr(metadata, name, {**getattr(metadata, name), **value} if merged else value)
        write_metadata(directory, metadata)

    return damage


def raw_metadata(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Change mixmoe_metadata.json as an editor does."""

    def damage(directory: Path) -> None:
        path = directory / "mixmoe_metadata.json"
        found = json.loads(path.read_text())
        edit(found)
        path.write_text(json.dumps(found))

    return damage


def file(name: str, change: Callable[[bytes], bytes] | None) -> Damage:
    """Change the bytes of a file; None: remove it."""

    def damage(directory: Path) -> None:
        path = directory / name
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes() if path.exists() else b""))

    return damage


class Exploit:
    """Unpickled naively, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def poison(directory: Path) -> None:
    (directory / "release" / ".metadata").write_bytes(pickle.dumps(Exploit(directory.parent.parent / "exploited")))


def poison_tensors(directory: Path) -> None:
    """Replace a tensor's bytes by a pickle, of the same place and length."""
    data = (directory / SHARD).read_bytes()
    evil = pickle.dumps(Exploit(directory.parent.parent / "exploited"))
    (directory / SHARD).write_bytes(evil + data[len(evil) :])


def edit_entries(edit: Callable[[Any], object]) -> Damage:
    """Change what `.metadata` says of the tensors."""

    def damage(directory: Path) -> None:
        path = directory / "release" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        edit(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return damage


def edit_places(edit: Callable[[Any], object]) -> Damage:
    """Change where `.metadata` says that the tensors lie."""
    return edit_entries(lambda metadata: [edit(place) for place in metadata.storage_data.values()])


def edit_embedding(edit: Callable[[Any], object]) -> Damage:
    """Change what `.metadata` says of the word embedding."""
    return edit_entries(lambda metadata: edit(metadata.state_dict_metadata["embedding.word_embeddings.weight"]))


def without_axes(entry: Any) -> None:
    """Make a tensor a scalar."""
    entry.size = entry.chunks[0].sizes = torch.Size([])
    entry.chunks[0].offsets = torch.Size([0, 0])[:0]


def many_layers(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["decoder.layers.self_attention.linear_qkv.weight"]
    entry.size = torch.Size([1 << 40, *entry.size[1:]])


def nothing(directory: Path) -> None:
    """Leave the input whole: the flags are wrong."""


def only_pickled(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save({}, directory / "pytorch_model.bin")


def first_entry(found: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in found.items() if name != "__metadata__")


def doubled(text: str) -> str:
    return text.replace('{"', f'{{"{Q}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "', 1)


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q][3, 3] = float("nan")


def swap(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q] = tensors[Q].T[:16].contiguous()
