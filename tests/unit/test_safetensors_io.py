"""Safetensors in and out: shards, index, and every way in which a directory can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixmoe_megatron.checkpoint.output_dir import whole_directory
from mixmoe_megatron.checkpoint.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsReader,
    parse_size,
    write_safetensors,
)
from mixmoe_megatron.checkpoint.tensors import LazyTensor
from mixmoe_megatron.errors import MixMoEError
from tests.helpers.mappings import lazy, read_tensor

TENSORS = {"a": torch.randn(4, 4), "b": torch.randn(4, 4).bfloat16(), "c": torch.arange(8.0)}


def plan() -> list[LazyTensor]:
    return [lazy(name, tensor) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (64, 2), (1, 3), (96, 2)])
def test_round_trip(tmp_path: Path, limit: int, files: int) -> None:
    seen: list[int] = []
    names = write_safetensors(tmp_path, plan(), limit, seen.append)
    assert len(names) == (1 if files == 1 else files + 1) and sum(seen) == 64 + 32 + 32
    reader = SafetensorsReader(tmp_path)
    assert set(reader.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = read_tensor(reader, name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    if files > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == 128 and set(index["weight_map"]) == set(TENSORS)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "200 mb", "3KB", "7")] == [5 * 10**9, 2 * 10**8, 3000, 7]
    for text in ("", "GB", "-1", "0", "5TB", "5B", "1.5GB"):
        with pytest.raises(MixMoEError, match="not a size"):
            parse_size(text)


def test_truncated_file(tmp_path: Path) -> None:
    save_file(TENSORS, str(tmp_path / SINGLE_FILE))
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        (tmp_path / SINGLE_FILE).write_bytes(whole[:length])
        with pytest.raises(MixMoEError, match="not a whole safetensors file"):
            SafetensorsReader(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match=f"neither {SINGLE_FILE}"):
        SafetensorsReader(tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(MixMoEError, match="pickled weights"):
        SafetensorsReader(tmp_path)
    with pytest.raises(MixMoEError, match="not a directory"):
        SafetensorsReader(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": []}', "not a safetensors index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is named, which is missing"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "not a file of this directory"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a file of this directory"),
        ('{"weight_map": {"a": ".."}}', "missing"),
        ('{"weight_map": {"a": "part.safetensors"}}', "disagree about b"),
        (
            '{"weight_map": {"a": "part.safetensors", "b": "part.safetensors", "d": "part.safetensors"}}',
            "disagree about d",
        ),
    ],
)
def test_broken_index(tmp_path: Path, index: str, message: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, str(model / "part.safetensors"))
    save_file({"a": TENSORS["a"]}, str(tmp_path / "other.safetensors"))
    (model / INDEX_FILE).write_text(index)
    with pytest.raises(MixMoEError, match=message):
        SafetensorsReader(model)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), whole_directory(out) as directory:
            (directory / "half").write_text("x")
            raise error
        assert not list(tmp_path.iterdir())
    with whole_directory(out) as directory:
        (directory / "file").write_text("1")
        assert not out.exists()
    assert (out / "file").read_text() == "1" and list(tmp_path.iterdir()) == [out]


def test_existing_content_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with whole_directory(out) as directory:  # an empty directory may be filled
        (directory / "file").write_text("1")
    with pytest.raises(MixMoEError, match=r"not empty.*--force"), whole_directory(out):
        raise AssertionError
    with pytest.raises(RuntimeError), whole_directory(out, force=True):
        raise RuntimeError
    assert (out / "file").read_text() == "1"
    with whole_directory(out, force=True) as directory:
        (directory / "other").write_text("2")
    assert [path.name for path in out.iterdir()] == ["other"] and list(tmp_path.iterdir()) == [out]
    (tmp_path / "plain").write_text("")
    with pytest.raises(MixMoEError, match="not a directory"), whole_directory(tmp_path / "plain"):
        raise AssertionError
