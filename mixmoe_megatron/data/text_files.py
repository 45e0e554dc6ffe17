"""Open text files by what their first bytes say, whatever their names: compressed ones are unpacked, others refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from _compression import DecompressReader
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixmoe_megatron.errors import MixMoEError

COMPRESSED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst", ".lzma")
_HEAD_BYTES = 512


def _open_zstd(stream: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")


#: first bytes -> name and opener of a compression that is read. xz and bzip2 are read without lzma.open and bz2.open,
#: which pass over what follows the first whole part in silence.
_COMPRESSIONS: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"\xfd7zXZ\0": ("xz", lambda stream: DecompressReader(stream, lzma.LZMADecompressor)),
    b"]\0\0": ("lzma", lambda stream: DecompressReader(stream, lzma.LZMADecompressor)),
    b"BZh": ("bzip2", lambda stream: DecompressReader(stream, bz2.BZ2Decompressor)),
    b"\x28\xb5\x2f\xfd": ("zstd", _open_zstd),
}
_UNPACK = "unpack it and give the text files in it"
_DECODE = "write it as UTF-8 first: iconv -f {} -t UTF-8"
#: place of the bytes, the bytes, what such a file is, what to do about it
_REFUSED = (
    (0, b"PK\3\4", "a zip archive", _UNPACK),
    (0, b"PK\5\6", "an empty zip archive", _UNPACK),
    (0, b"PK\7\x08", "a part of a zip archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "lz4 data", "unpack it first: lz4 -d"),
    (0, b"LZIP\1", "lzip data", "unpack it first: lzip -d"),
    (0, b"\x89LZO\0", "lzop data", "unpack it first: lzop -d"),
    (0, b"\x1f\x9d", "compress data (.Z)", "unpack it first: uncompress"),
    (0, b"PAR1\x15", "a Parquet file", "give it a name that ends in .parquet, to tools/prepare_data.py"),
    (0, b"%PDF-", "a PDF document", "give plain text"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch that with git lfs pull"),
    (0, b"\xff\xfe\0\0", "UTF-32 text", _DECODE.format("UTF-32")),
    (0, b"\0\0\xfe\xff", "UTF-32 text", _DECODE.format("UTF-32")),
    (0, b"\xff\xfe", "UTF-16 text", _DECODE.format("UTF-16")),
    (0, b"\xfe\xff", "UTF-16 text", _DECODE.format("UTF-16")),
)


def format_of(path: str | Path) -> str:
    """Return the suffix of a file's name, in small letters, compressions left out: ``.tsv`` of A.TSV.GZ."""
    name = Path(path).name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


@contextmanager
def open_packed(path: str | Path) -> Iterator[tuple[io.BufferedReader, str]]:
    """Open a file for reading bytes; gzip, xz, lzma, bzip2 and zstd are unpacked, whatever the file's name.

    Args:
        path: The file.

    Yields:
        The stream of unpacked bytes, and the compression's name, empty where there is none.

    Raises:
        OSError: It cannot be opened. Broken data is found later, by who reads the stream.
    """
    with open(path, "rb") as stream:
        found = _compression_of(_head(stream))
        yield (io.BufferedReader(found[1](stream)), found[0]) if found else (stream, "")


def check_is_text(path: str | Path, stream: io.BufferedReader, compression: str) -> None:
    """Refuse a stream that begins with what no UTF-8 text begins with.

    Args:
        path: Its file, for the message.
        stream: As `open_packed` returns it; stays where it is.
        compression: As `open_packed` returns it.

    Raises:
        MixMoEError: It is an archive, data packed twice, or text in another encoding.
        EOFError, OSError, lzma.LZMAError, zlib.error: The packed data is broken.
    """
    head = _head(stream)
    where = f"{path}, unpacked ({compression}), is" if compression else f"{path} is"
    for place, magic, what, remedy in _REFUSED:
        if head[place : place + len(magic)] == magic:
            raise MixMoEError(f"{where} {what}: {remedy}.")
    if compression and (again := _compression_of(head)):
        raise MixMoEError(f"{where} {again[0]} data once more: unpack it first.")


def _head(stream: io.BufferedReader) -> bytes:
    return stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]


def _compression_of(head: bytes) -> tuple[str, Callable[[Any], Any]] | None:
    for magic, found in _COMPRESSIONS.items():
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] in (b"1AY&SY", b"\x17rE8P\x90")):
            return found
    return None
