"""Write and open token files: Megatron's P.bin and P.idx, and our manifest P.json, which is written last.

A reader demands the manifest, so an interrupted build is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixmoe_megatron.cli import write_json
from mixmoe_megatron.data.corpus import sha256_of_file, summarise
from mixmoe_megatron.data.tokenizers import TextTokenizer
from mixmoe_megatron.errors import MixMoEError

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
SUFFIXES = (".bin", ".idx", ".json")
#: Of P.idx: magic, version, code of the dtype, sequences, documents + 1. There follow each sequence's length (int32)
#: and place in P.bin (int64), where documents end (int64), and each sequence's mode (int8) if it has one.
_INDEX_HEADER, _INDEX_MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\x00\x00"
#: Megatron's codes of the dtypes that it chooses from
_DTYPE_CODES = {"int32": 4, "uint16": 8}

#: The sequences of token ids of one document, and the mode stored with each
Document = tuple[Sequence[Sequence[int]], int]


class TokenFileWriter:
    """Write documents under temporary names; `commit` renames them. Leaving the `with` block uncommitted removes them.

    Args:
        prefix: Path without suffix; its directory is created.
        vocab_size: Decides the stored dtype: uint16 below 65500 ids, else int32 (Megatron's rule).
        with_modes: Store a number with each sequence.

    Raises:
        MixMoEError: The prefix ends in one of the suffixes that are added to it, or its directory cannot be made.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, *, with_modes: bool = False) -> None:
        self.prefix = str(prefix)
        if self.prefix.endswith(SUFFIXES):
            raise MixMoEError(f"Give the output prefix without a suffix: {self.prefix} gets .bin, .idx and .json.")
        folder = Path(self.prefix).absolute().parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MixMoEError(f"Cannot make the directory of {self.prefix}: {error.strerror}.") from error
        self.dtype = np.dtype("uint16" if vocab_size < 65500 else "int32")
        self._with_modes = with_modes
        self._lengths, self._ends, self._modes = array("i"), array("q", [0]), array("b")
        self._temporary = f"{self.prefix}.{os.getpid()}.tmp"
        self._tokens = open(f"{self._temporary}.bin", "wb")  # noqa: SIM115 - __exit__ closes it

    def __enter__(self) -> TokenFileWriter:
        """Return the writer."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove whatever was not committed, and the directories made for it."""
        self._tokens.close()
        for suffix in SUFFIXES:
            Path(self._temporary + suffix).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder that holds something stays
            for path in self._made:
                path.rmdir()

    def add(self, sequences: Sequence[Sequence[int]], mode: int = 0) -> None:
        """Append one document.

        Args:
            sequences: Its sequences of token ids.
            mode: The number (int8) stored with each sequence, when the writer stores modes.
        """
        for sequence in sequences:
            self._tokens.write(np.array(sequence, self.dtype).tobytes())
            self._lengths.append(len(sequence))
            self._modes.append(mode)
        self._ends.append(len(self._lengths))

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Finish the files and rename them to their names, the manifest last.

        Args:
            manifest: What to record beside format version, dtype, documents and tokens.

        Returns:
            The whole manifest.
        """
        self._tokens.close()
        lengths = np.array(self._lengths, np.int64)
        whole = {
            "format_version": FORMAT_VERSION,
            **manifest,
            "dtype": self.dtype.name,
            "documents": len(self._ends) - 1,
            "tokens": int(lengths.sum()),
        }
        places = (lengths.cumsum() - lengths) * self.dtype.itemsize
        with open(f"{self._temporary}.idx", "wb") as index:
            code = _DTYPE_CODES[self.dtype.name]
            index.write(_INDEX_HEADER.pack(_INDEX_MAGIC, 1, code, len(lengths), len(self._ends)))
            for part in (self._lengths, places, self._ends, self._modes if self._with_modes else b""):
                index.write(bytes(part))
        write_json(f"{self._temporary}.json", whole)
        Path(f"{self.prefix}.json").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            os.replace(self._temporary + suffix, self.prefix + suffix)
        return whole


def read_manifest(prefix: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read P.json and check that P.bin and P.idx lie beside it.

    Args:
        prefix: Path without suffix.
        kind: "monolingual" or "parallel": what the caller needs; None takes either.

    Raises:
        MixMoEError: A file is missing, the manifest is broken, of another format version or of the other kind, or
            P.bin has not the size that it tells.
    """
    missing = [f"{prefix}{suffix}" for suffix in SUFFIXES if not os.path.isfile(f"{prefix}{suffix}")]
    if missing:
        raise MixMoEError(f"{missing[0]} does not exist; build the data with tools/preprocess_data.py.")
    try:
        manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        version, found = manifest["format_version"], manifest["kind"]
        expected = manifest["tokens"] * np.dtype(manifest["dtype"]).itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise MixMoEError(f"{prefix}.json is not a data manifest ({error}).") from error
    if version != FORMAT_VERSION:
        raise MixMoEError(f"{prefix}.json has format version {version}, this program reads {FORMAT_VERSION}.")
    if (size := os.path.getsize(f"{prefix}.bin")) != expected:
        raise MixMoEError(f"{prefix}.bin has {size} bytes where its manifest says {expected}; copy or build it again.")
    _check_index(f"{prefix}.idx", manifest)
    if kind is not None and found != kind:
        raise MixMoEError(f"{prefix} holds {found} data where {kind} data is needed.")
    return manifest


def _check_index(path: str, manifest: dict[str, Any]) -> None:
    """Check that P.idx is whole: Megatron would fail in its middle, or read what is not there.

    Raises:
        MixMoEError: Its size, or where the last document ends, is not what the manifest's documents and tokens give.
    """
    documents, tokens, itemsize = manifest["documents"], manifest["tokens"], np.dtype(manifest["dtype"]).itemsize
    with open(path, "rb") as stream:
        magic, version, _, sequences, ends = _INDEX_HEADER.unpack(
            stream.read(_INDEX_HEADER.size).ljust(_INDEX_HEADER.size)
        )
        whole = (magic, version, ends) == (_INDEX_MAGIC, 1, documents + 1)
        size = _INDEX_HEADER.size + 12 * sequences + 8 * ends
        if whole and os.path.getsize(path) in (size, size + sequences):
            last = []
            for end, width in ((size - 8 * ends - 8 * sequences, 4), (size - 8 * ends, 8), (size, 8)):
                stream.seek(end - width)
                last.append(int.from_bytes(stream.read(width), "little"))
            length, pointer, document_end = last
            if (pointer + length * itemsize, document_end) == (tokens * itemsize, sequences):
                return
    raise MixMoEError(
        f"{path} is not the whole index of the {documents} documents that its manifest tells; copy or build it again."
    )


def check_same_tokenizer(prefix: str | Path, manifest: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Check that token files were built with this tokenizer.

    Raises:
        MixMoEError: Its fingerprint is another one.
    """
    if manifest["tokenizer"]["sha256"] != tokenizer.fingerprint():
        raise MixMoEError(
            f"{prefix} was built with another tokenizer than the one in {tokenizer.directory}; "
            "build it again with tools/preprocess_data.py."
        )


def build_token_file(
    prefix: str | Path,
    tokenizer: TextTokenizer,
    inputs: Sequence[str | Path],
    documents: Iterable[Document],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Write the documents made of text files, with a manifest that tells how.

    Args:
        prefix: P, the output path without suffix.
        tokenizer: The model's tokenizer.
        inputs: The text files.
        documents: They are made as they are written.
        manifest: Their `kind`, and how they were made. Its Counter `counts` goes on while they are: whoever makes them
            counts what is read and dropped, and here is counted what is `kept`.

    Returns:
        The whole manifest, with sources and tokenizer.

    Raises:
        MixMoEError: An input cannot be read, or there is no document.
    """
    sources, counts = describe_sources(inputs), manifest["counts"]
    noun, with_modes = ("pair", True) if manifest["kind"] == "parallel" else ("document", False)
    with TokenFileWriter(prefix, tokenizer.vocab_size, with_modes=with_modes) as writer:
        for sequences, mode in documents:
            writer.add(sequences, mode)
            counts["kept"] += 1
        if not counts["kept"]:
            raise MixMoEError(f"No {noun} is left of {', '.join(map(str, inputs))}: {summarise(counts)}.")
        manifest = writer.commit({**manifest, "sources": sources, "tokenizer": tokenizer.describe()})
    logger.info("%s: %s; %d tokens", prefix, summarise(counts), manifest["tokens"])
    return manifest


def describe_sources(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """Return each source file's path as given, and its sha256.

    Raises:
        MixMoEError: A file cannot be read.
    """
    sources = []
    for path in paths:
        try:
            sources.append({"path": str(path), "sha256": sha256_of_file(path)})
        except OSError as error:
            raise MixMoEError(f"Cannot read {path}: {error.strerror}.") from error
    return sources
