"""What PyTorch writes we read, and what we write PyTorch reads; nothing that a pickle names is ever run."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from mixmoe_megatron.checkpoint import torch_format
from mixmoe_megatron.checkpoint.bits import ITEMSIZE, from_torch, to_torch
from mixmoe_megatron.checkpoint.stored import whole
from mixmoe_megatron.checkpoint.streaming import FileView, opened
from mixmoe_megatron.checkpoint.torch_format import find_tensor, write_object, write_tensor

SHAPES: list[tuple[int, ...]] = [(), (0, 3), (5,), (4, 6), (2, 3, 4)]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def saved(path: Path, value: Any, offset: int = 7) -> tuple[Path, int, int]:
    stream = io.BytesIO()
    torch.save(value, stream)
    path.write_bytes(bytes(offset) + stream.getvalue() + b"more")
    return path, offset, len(stream.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_there_and_back(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, name = make(shape, dtype), str(dtype).removeprefix("torch.")
    found = find_tensor(*saved(tmp_path / "theirs", tensor))
    assert (found.shape, found.dtype) == (shape, name)
    assert torch.equal(to_torch(found.read(whole(shape)), name), tensor)

    data = from_torch(tensor).tobytes()
    blocks = [memoryview(data)[k : k + 16] for k in range(0, len(data), 16)]
    with opened(tmp_path / "ours") as file:
        view = FileView(file, 7)
        write_tensor(view, name, shape, blocks)
        length = view.tell()
    content = (tmp_path / "ours").read_bytes()[7:]
    assert len(content) == length
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.dtype == dtype and torch.equal(loaded, tensor) and loaded.is_contiguous()
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    again = find_tensor(tmp_path / "ours", 7, length)
    assert torch.equal(to_torch(again.read(whole(shape)), name), tensor)


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t.T,
        lambda t: t.view(2, 2, 6).permute(2, 0, 1),
        lambda t: t.view(4, 1, 6).permute(1, 2, 0),
        lambda t: t[1:, 2:5],
        lambda t: t[:, ::2],
        lambda t: t[2:],
        lambda t: t[1:, 2:5].T,
        lambda t: t.expand(2, 4, 6),
    ],
    ids=["transposed", "permuted", "one", "box", "every second", "rows", "transposed box", "expanded"],
)
def test_views_of_a_larger_storage(tmp_path: Path, cut: Any) -> None:
    tensor = cut(make((4, 6), torch.float32))
    found = find_tensor(*saved(tmp_path / "file", tensor))
    shape = tuple(tensor.shape)
    regions = [
        whole(shape),
        (slice(0, 1), *whole(shape[1:])),
        (*whole(shape[:-1]), slice(1, 2)),
        whole((1,) * len(shape)),
    ]
    for region in [*regions, (*whole(shape[:-1]), slice(1, 1))]:
        assert torch.equal(to_torch(found.read(region), "float32"), tensor[region])


def test_objects_are_what_torch_loads(tmp_path: Path) -> None:
    value = [{"args": argparse.Namespace(a=1, b=[0, 1]), "iteration": 0, "x": (None, 1.5, "text")}]
    for stored in (value, [None]):
        with opened(tmp_path / "file") as file:
            os.truncate(file, 0)
            write_object(FileView(file, 0), stored)
        assert torch.load(tmp_path / "file", weights_only=False) == stored


def their_metadata() -> torch_metadata.Metadata:
    size = torch.Size
    matrix = torch_metadata.TensorStorageMetadata(
        torch_metadata.TensorProperties(dtype=torch.bfloat16), size([2, 4]),
        [torch_metadata.ChunkStorageMetadata(size([0, k]), size([2, 2])) for k in (0, 2)],
    )  # fmt: skip
    places = {torch_metadata.MetadataIndex("m", size([0, k])): _StorageInfo("a.distcp", k, 9) for k in (0, 2)}
    return torch_metadata.Metadata(
        state_dict_metadata={"m": matrix, "object": torch_metadata.BytesStorageMetadata()},
        planner_data={"m": ("m",)},
        storage_data={**places, torch_metadata.MetadataIndex("object"): _StorageInfo("b.distcp", 0, 5)},
        storage_meta=torch_metadata.StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )


def our_metadata() -> torch_format.StoredMetadata:
    size = torch_format.Size
    matrix = torch_format.TensorStorageMetadata(
        torch_format.TensorProperties("bfloat16"), size([2, 4]),
        [torch_format.ChunkStorageMetadata(size([0, k]), size([2, 2])) for k in (0, 2)],
    )  # fmt: skip
    places = {torch_format.MetadataIndex("m", size([0, k])): torch_format.StorageInfo("a.distcp", k, 9) for k in (0, 2)}
    return torch_format.StoredMetadata(
        state_dict_metadata={"m": matrix, "object": torch_format.BytesStorageMetadata()},
        planner_data={"m": ("m",)},
        storage_data={**places, torch_format.MetadataIndex("object"): torch_format.StorageInfo("b.distcp", 0, 5)},
    )


def test_metadata_is_what_torch_reads() -> None:
    theirs = pickle.loads(torch_format.dump_metadata(our_metadata()))
    expected = their_metadata()
    expected.storage_meta = None
    assert type(theirs) is torch_metadata.Metadata and theirs == expected


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_torchs_metadata_is_read(tmp_path: Path, protocol: int) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(their_metadata(), protocol))
    found, expected = torch_format.load_metadata(tmp_path / ".metadata"), our_metadata()
    assert found.storage_data == expected.storage_data and found.version == CURRENT_DCP_VERSION
    matrix, wanted = found.state_dict_metadata["m"], expected.state_dict_metadata["m"]
    assert isinstance(matrix, torch_format.TensorStorageMetadata)
    assert isinstance(wanted, torch_format.TensorStorageMetadata)
    assert (matrix.size, matrix.chunks) == (wanted.size, wanted.chunks) and matrix.properties.dtype == "bfloat16"
    assert found.state_dict_metadata["object"] == torch_format.BytesStorageMetadata()


def test_every_dtype_of_a_storage_has_its_size() -> None:
    for name, dtype in torch_format._STORAGES.items():
        assert getattr(torch, name).dtype == getattr(torch, dtype)
        assert getattr(torch, dtype).itemsize == ITEMSIZE[dtype]


class Exploit:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploited",)


@pytest.mark.parametrize("value", [Exploit(), torch.nn.Linear(1, 1), {"a": torch.ones(2)}, [1]])
def test_anything_but_a_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.chdir(tmp_path)
    place = saved(tmp_path / "file", value)
    with pytest.raises((pickle.UnpicklingError, ValueError), match=r"not allowed|something else"):
        find_tensor(*place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "state", [b"cposix\nsystem\n(S'touch exploited'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"(lp0\n."]
)
def test_hostile_metadata_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(state)
    with pytest.raises((pickle.UnpicklingError, TypeError), match=r"not allowed|it holds a list"):
        torch_format.load_metadata(tmp_path / ".metadata")
    assert [path.name for path in tmp_path.iterdir()] == [".metadata"]


def test_a_pickle_gets_no_real_class(tmp_path: Path) -> None:
    """A pickle may set attributes on a class that it gets; a path's could let files outside of a directory in."""
    pickled = pickle.dumps(Path("x"))
    assert b"PosixPath" in pickled
    for state in (pickled, pickled.replace(b"\x8c\x07pathlib", b"\x8c\x0epathlib._local")):
        found = torch_format._Unpickler(io.BytesIO(state)).load()
        assert type(found) is torch_format._Ignored
    classes = [found for found in torch_format._STAND_INS.values() if isinstance(found, type)]
    assert {found.__module__ for found in classes} == {torch_format.__name__, "collections"}


def rewritten(path: Path, change: Any) -> tuple[Path, int, int]:
    """A tensor's archive with a record changed: name -> new content, or None to leave it out."""
    tensor = make((4, 6), torch.float32)
    stream = io.BytesIO()
    torch.save(tensor, stream)
    out = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = change(info.filename.partition("/")[2], old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    path.write_bytes(out.getvalue())
    return path, 0, len(out.getvalue())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda name, data: b"big" if name == "byteorder" else data, ValueError),
        (lambda name, data: data[:-1] if name == "data/0" else data, ValueError),
        (lambda name, data: None if name == "data/0" else data, KeyError),
        (lambda name, data: None if name == "data.pkl" else data, KeyError),
        (lambda name, data: data[:-9] if name == "data.pkl" else data, (EOFError, pickle.UnpicklingError)),
    ],
    ids=["big-endian", "short", "no values", "no pickle", "cut pickle"],
)
def test_damaged_archives(tmp_path: Path, change: Any, error: Any) -> None:
    with pytest.raises(error):
        find_tensor(*rewritten(tmp_path / "file", change))


def test_archives_beyond_the_limits_of_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several gigabytes take the records of zip64, which a lower limit brings about here."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    tensor = make((4, 6), torch.float32)
    with opened(tmp_path / "file") as file:
        view = FileView(file, 0)
        write_tensor(view, "float32", (4, 6), [memoryview(from_torch(tensor).tobytes())])
        length = view.tell()
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True), tensor)
    found = find_tensor(tmp_path / "file", 0, length)
    assert torch.equal(to_torch(found.read(whole((4, 6))), "float32"), tensor)
    assert b"\x01\x00\x10\x00" in (tmp_path / "file").read_bytes()  # the extra field of 64-bit sizes
