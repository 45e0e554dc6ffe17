"""PyTorch's file formats of a distributed checkpoint, in plain Python: torch takes longer to import than to convert.

- An archive is what `torch.save` makes of one value: a zip file of a pickle and, for a tensor, its bytes as they are.
- `.metadata` is a pickle of dataclasses of `torch.distributed.checkpoint`.

In a pickle classes and functions go by their names. Those that occur here have a stand-in of the same state, so that
reading makes nothing but stand-ins, whatever a file holds: a pickle cannot run code here.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

from mixmoe_megatron.checkpoint.bits import ITEMSIZE
from mixmoe_megatron.checkpoint.stored import StoredTensor, contiguous_strides
from mixmoe_megatron.checkpoint.streaming import FileView

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_LOCAL_HEADER_BYTES = 30  # of a zip record, before its name
DCP_VERSION = "1.0.0"


class _Called:
    """A value that a pickle makes by calling something with one argument."""

    def __reduce__(self) -> tuple[Any, ...]:
        base = type(self).__bases__[-1]  # the built-in type of the argument
        return type(self), (base(self),)


class Size(_Called, tuple[int, ...]):
    """torch.Size."""


class _Layout(_Called, str):
    """What torch.serialization._get_layout returns; the argument is the layout's name."""


class _MemoryFormat(_Called, int):
    """torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING."""


class TorchName(str):
    """Something of the module torch, by its name: a dtype or the class of a storage."""


class TensorProperties:
    """Of it, the dtype alone is used.

    Args:
        dtype: name in torch.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = TorchName(dtype)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.dtype, _Layout("torch.strided"), False, _MemoryFormat(0), False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


@dataclass
class ChunkStorageMetadata:
    """A part of a tensor."""

    offsets: Size
    sizes: Size


@dataclass
class TensorStorageMetadata:
    """A tensor, and the parts in which it is stored."""

    properties: TensorProperties
    size: Size
    chunks: list[ChunkStorageMetadata] = field(default_factory=list)


@dataclass
class BytesStorageMetadata:
    """An object that is not a tensor."""


@dataclass(frozen=True)
class MetadataIndex:
    """The key of a stored object or part of a tensor; `index` is a hint."""

    fqn: str
    offset: Size | None = None
    index: int | None = field(default=None, compare=False)


@dataclass
class StorageInfo:
    """Where an archive lies: a file of the directory, and bytes of that file."""

    relative_path: str
    offset: int
    length: int


@dataclass
class StoredMetadata:
    """What `.metadata` holds."""

    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    planner_data: Any = None
    storage_data: Any = None
    storage_meta: Any = None
    version: str | None = DCP_VERSION


class _Ignored:
    """Stands in for a class whose objects are not looked at."""

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class _Storage:
    """The values of a tensor in its archive."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as its pickle tells it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor, (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_rest: Any
) -> _Tensor:
    """torch._utils._rebuild_tensor_v2."""
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_CHECKPOINT = "torch.distributed.checkpoint"
_STAND_INS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): Size,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): _Ignored,
    ("pathlib._local", "PosixPath"): _Ignored,  # of Python 3.13
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.serialization", "_get_layout"): _Layout,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    (f"{_CHECKPOINT}.metadata", "Metadata"): StoredMetadata,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): StorageInfo,
    **{
        (f"{_CHECKPOINT}.metadata", stand_in.__name__): stand_in
        for stand_in in (
            BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
        )
    },
}  # fmt: skip
_NAMES = {stand_in: name for name, stand_in in _STAND_INS.items() if stand_in is not _Ignored}
_IGNORED_MODULES = tuple(f"{_CHECKPOINT}.{name}" for name in ("metadata", "planner", "filesystem"))


_PurePickler: Any = pickle._Pickler


class _Pickler(_PurePickler):
    """Pickle stand-ins under the names of what they stand for; the written-in-C class would look these up in torch."""

    dispatch: ClassVar[dict[type, Any]] = dict(_PurePickler.dispatch)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if (named := _NAMES.get(obj)) is None:
            super().save_global(obj, name)
        else:
            self._save_name(*named, obj)

    def save_torch_name(self, obj: TorchName) -> None:
        self._save_name("torch", str(obj), obj)

    def _save_name(self, module: str, name: str, obj: Any) -> None:
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii"))
        self.memoize(obj)

    dispatch[TorchName] = save_torch_name
    dispatch[FunctionType] = save_global

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", TorchName(_STORAGE_NAMES[obj.dtype]), obj.key, "cpu", obj.count


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if found := _STAND_INS.get((module, name)):
            return found
        if module == "torch" and (name in ITEMSIZE or name in _STORAGES):
            return TorchName(name)
        if module in _IGNORED_MODULES:
            return _Ignored
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _location, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"{kind!r} is not a tensor's storage")
        return _Storage(key, _STORAGES[storage], count)


def dump_metadata(metadata: StoredMetadata) -> bytes:
    """Return the contents of `.metadata`."""
    return _pickled(metadata, protocol=4)


def load_metadata(path: Path) -> StoredMetadata:
    """Read `.metadata`.

    Raises:
        Exception: it cannot be read; there is hardly one that damaged bytes cannot raise.
    """
    with path.open("rb") as stream:
        found = _Unpickler(stream).load()
    if not isinstance(found, StoredMetadata):
        raise TypeError(f"it holds a {type(found).__name__}")
    return found


def _pickled(value: Any, protocol: int) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def write_object(file: FileView, value: Any) -> None:
    """Write an archive as `torch.save` makes one of a value that holds no tensor."""
    _write_archive(file, value)


def write_tensor(file: FileView, dtype: str, shape: tuple[int, ...], blocks: Iterable[memoryview]) -> None:
    """Write an archive as `torch.save` makes one of a tensor.

    Args:
        file: view that begins where the archive is to begin.
        dtype: name in torch.
        shape: of the tensor.
        blocks: all its bytes in their order.

    Raises:
        OSError: the disk is full, or fails.
    """
    count = math.prod(shape)
    tensor = _Tensor(_Storage("0", dtype, count), 0, shape, contiguous_strides(shape))
    _write_archive(file, tensor, count * ITEMSIZE[dtype], blocks)


def _write_archive(file: FileView, value: Any, num_bytes: int = 0, blocks: Iterable[memoryview] | None = None) -> None:
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)

        add("data.pkl", _pickled(value, protocol=2))
        add("byteorder", b"little")
        if blocks is not None:
            record = zipfile.ZipInfo("archive/data/0")
            with archive.open(record, "w", force_zip64=num_bytes >= zipfile.ZIP64_LIMIT) as stream:
                for block in blocks:
                    stream.write(block)
        add("version", b"3\n")


def find_tensor(path: Path, offset: int, length: int) -> StoredTensor:
    """Return where the values lie of the tensor in an archive.

    Args:
        path: of the file that holds the archive.
        offset: of the archive in the file, in bytes.
        length: of the archive, in bytes.

    Raises:
        OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError: it is damaged, or holds
            something else.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        view = FileView(file, offset, length)
        with zipfile.ZipFile(view) as archive:
            names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
                raise ValueError("its bytes are not in little-endian order")
            tensor = _Unpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
            if not isinstance(tensor, _Tensor):
                raise ValueError("it holds something else there")
            storage = tensor.storage
            itemsize = ITEMSIZE[storage.dtype]
            start, stored = 0, 0
            if storage.count:
                info = names[f"data/{storage.key}"]
                view.seek(info.header_offset)
                header = view.read(_LOCAL_HEADER_BYTES)
                assert header is not None
                name_and_extra = (int.from_bytes(header[k : k + 2], "little") for k in (26, 28))
                start = info.header_offset + _LOCAL_HEADER_BYTES + sum(name_and_extra)
                stored = info.file_size if info.compress_type == zipfile.ZIP_STORED else 0
    finally:
        os.close(file)
    found = StoredTensor(path, offset + start + tensor.offset * itemsize, storage.dtype, tensor.shape, tensor.strides)
    if min(tensor.offset, *tensor.strides, 0) < 0 or (tensor.offset + found.reach) * itemsize > stored:
        raise ValueError("it holds fewer values than it says")
    if start + stored > length:
        raise ValueError("its values lie outside")
    return found
