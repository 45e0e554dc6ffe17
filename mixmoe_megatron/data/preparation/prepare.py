"""Run a protocol: read, clean, filter, deduplicate, keep test text out of training, sample, write, record.

Output in one directory: `xx-en.SPLIT.tsv.gz` with one column for each language code, `mono.xx.SPLIT.txt.gz`, and
`manifest.json`, which is written last: without it nothing there counts as finished. The same protocol over the same
local files does nothing when it is run again.

Memory: a training split of which a number of lines is chosen holds that many lines; of any other, 16-byte digests are
held (about 80 bytes a line), of test and validation text too.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import heapq
import json
import logging
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from itertools import batched
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixmoe_megatron.cli import write_json
from mixmoe_megatron.data.corpus import Deduplicator, Row, drop, is_utf8, one_line, reading, sha256_of_file, summarise
from mixmoe_megatron.data.preparation.filters import filter_rows
from mixmoe_megatron.data.preparation.protocol import Protocol, pair_languages
from mixmoe_megatron.data.preparation.sources import Source
from mixmoe_megatron.errors import MixMoEError

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_BATCH_ROWS = 2000
_PARTIAL = ".preparing"

Texts = tuple[str, ...]


def prepare(protocol: Protocol, output_dir: str | Path, workers: int = 1) -> dict[str, Any]:
    """Write the protocol's files.

    Args:
        protocol: What to prepare.
        output_dir: Gets the files; other files there are left alone.
        workers: Processes that filter; the result does not depend on it.

    Returns:
        The manifest: protocol, its sha256, local sources with their hashes, and for each file its lines, bytes, sha256
        and counts: `read`, `kept`, `dropped_<reason>`, `not_sampled`.

    Raises:
        MixMoEError: A source cannot be read or has no such column, a split is empty, or the arguments make no sense.
    """
    if workers < 1:
        raise MixMoEError(f"--workers must be 1 or more, not {workers}.")
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise MixMoEError(f"{directory} is a file: choose another output directory.")
    described = _describe(protocol)
    if (done := _finished(directory, described["sha256"])) is not None:
        logger.info("%s is up to date: nothing to do", directory)
        return done
    partial = directory / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(workers, spawn) if workers > 1 else contextlib.nullcontext() as pool:
            outputs = _Preparation(protocol, partial, pool, 2 * workers).run()
        manifest = {"format_version": FORMAT_VERSION, **described, "files": outputs}
        (directory / MANIFEST).unlink(missing_ok=True)
        for name in outputs:
            os.replace(partial / name, directory / name)
        write_json(directory / MANIFEST, manifest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            directory.rmdir()  # only when it is empty
    return manifest


def _describe(protocol: Protocol) -> dict[str, Any]:
    """The protocol and the hashes of its local files, and one sha256 over both."""
    value = json.loads(json.dumps(asdict(protocol)))  # as it is read again
    splits = [*protocol.parallel.values(), *protocol.monolingual.values()]
    paths = [path for split in splits for source in split.values() for path in source.paths()]
    sources = {path: sha256_of_file(path) for path in paths}
    whole = {"protocol": value, "sources": sources}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return {"sha256": digest, **whole}


def _finished(directory: Path, digest: str) -> dict[str, Any] | None:
    """The manifest of an earlier run of the same protocol, when all its files are there in full length."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        whole = all((directory / name).stat().st_size == file["bytes"] for name, file in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole and manifest.get("sha256") == digest else None


class _Preparation:
    """One run. Test sets come first and validation sets second: what they hold is kept out of all that follows."""

    def __init__(self, protocol: Protocol, directory: Path, pool: ProcessPoolExecutor | None, under_way: int) -> None:
        self._protocol, self._directory, self._pool, self._under_way = protocol, directory, pool, under_way
        self._held_out: dict[str, set[bytes]] = {"test": set(), "valid": set()}
        self._outputs: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, dict[str, Any]]:
        """Write all splits and return what is known of each file."""
        protocol = self._protocol
        parts = (
            (protocol.parallel, "{}.{}.tsv.gz", protocol.pairs_per_language),
            (protocol.monolingual, "mono.{}.{}.txt.gz", protocol.lines_per_language),
        )
        jobs = [
            (pair_languages(pair), split, source, form.format(pair, split), limit)
            for part, form, limit in parts
            for pair, splits in part.items()
            for split, source in splits.items()
        ]
        order = {"train": 2, "valid": 1}
        for languages, split, source, name, limit in sorted(jobs, key=lambda job: order.get(job[1], 0)):
            started, counts = time.monotonic(), Counter(read=0, kept=0)
            rows = tqdm(source.rows(languages), desc=name, unit=" rows", mininterval=1.0)
            if split in order:
                usable = self._usable(rows, languages, ("test", "valid") if split == "train" else ("test",), counts)
                limited = limit > 0 and split == "train"
                lines = _sample(usable, limit, protocol.seed, counts) if limited else _unique(usable, counts)
            else:
                lines = _as_published(rows, source, counts)
            self._write(name, split, lines, languages, counts)
            if not counts["kept"]:
                raise MixMoEError(f"{name}: no line is left of {source.label()} ({summarise(counts)}).")
            rate = counts["read"] / max(1e-9, time.monotonic() - started)
            logger.info("%s: %s; %.0f rows a second", name, summarise(counts), rate)
        return self._outputs

    def _usable(
        self, rows: Iterable[Row], languages: Sequence[str], held_out: Sequence[str], counts: Counter[str]
    ) -> Iterator[Texts]:
        """Filter, and drop what one of the `held_out` kinds of split holds on any side."""
        for kept, more in self._filtered(rows, languages):
            counts.update(more)
            for texts in kept:
                keys = [_held_out_key(text) for text in texts]
                split = next((name for name in held_out if not self._held_out[name].isdisjoint(keys)), None)
                if split is None:
                    yield texts
                else:
                    drop(counts, f"in_{split}")

    def _filtered(self, rows: Iterable[Row], languages: Sequence[str]) -> Iterator[tuple[list[Texts], Counter[str]]]:
        """Yield what `filter_rows` makes of each batch, in order; a bounded number of batches is under way."""
        batches = batched(rows, _BATCH_ROWS)
        if self._pool is None:
            yield from (filter_rows(batch, languages, self._protocol.filters) for batch in batches)
            return
        under_way: deque[Future[tuple[list[Texts], Counter[str]]]] = deque()
        for batch in batches:
            under_way.append(self._pool.submit(filter_rows, batch, languages, self._protocol.filters))
            if len(under_way) > self._under_way:
                yield under_way.popleft().result()
        yield from (future.result() for future in under_way)

    def _write(
        self, name: str, split: str, lines: Iterable[Texts], languages: Sequence[str], counts: Counter[str]
    ) -> None:
        """Write one file, and remember the texts of test and validation sets."""
        path, held = self._directory / name, self._held_out["valid" if split == "valid" else "test"]
        with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
            if len(languages) > 1:
                stream.write(("\t".join(languages) + "\n").encode())
            for texts in lines:
                counts["kept"] += 1
                if split != "train":
                    held.update(map(_held_out_key, texts))
                stream.write(("\t".join(texts) + "\n").encode())
        size, digest = path.stat().st_size, sha256_of_file(path)
        self._outputs[name] = {"lines": counts["kept"], "bytes": size, "sha256": digest, "counts": dict(counts)}


def _as_published(rows: Iterable[Row], source: Source, counts: Counter[str]) -> Iterator[Texts]:
    """A test set, every line of it, as tools/evaluate_translation.py reads it too."""
    for number, row in enumerate(rows, start=1):
        counts["read"] += 1
        if row is None or not all(map(reading, row)):
            raise MixMoEError(f"Row {number} of the test set {source.label()} is broken or has an empty side.")
        if not all(map(is_utf8, row)):
            raise MixMoEError(f"Row {number} of the test set {source.label()} is not UTF-8.")
        yield tuple(map(one_line, row))


def _unique(lines: Iterable[Texts], counts: Counter[str]) -> Iterator[Texts]:
    """Leave out what came before."""
    seen = Deduplicator()
    for texts in lines:
        if seen.is_new(*texts):
            yield texts
        else:
            drop(counts, "duplicate")


def _sample(lines: Iterable[Texts], limit: int, seed: int, counts: Counter[str]) -> Iterator[Texts]:
    """Choose `limit` different lines at random, and yield them in random order.

    Those with the smallest keyed hash are taken: the choice depends on the seed and on the set of lines alone, not on
    their order, and equal lines meet in one place. Duplicates of a line that is not in the sample count as not sampled.
    """
    key = hashlib.sha256(str(seed).encode()).digest()
    heap: list[int] = []  # of negative numbers: the largest hash first
    chosen: dict[int, Texts] = {}
    for texts in lines:
        seen = "\0".join(map(reading, texts)).encode()
        number = int.from_bytes(hashlib.blake2b(seen, digest_size=16, key=key).digest(), "big")
        if number in chosen:
            drop(counts, "duplicate")
            chosen[number] = min(chosen[number], texts)  # of those that look alike
            continue
        if len(heap) == limit and number > -heap[0]:
            counts["not_sampled"] += 1
            continue
        chosen[number] = texts
        if len(heap) < limit:
            heapq.heappush(heap, -number)
        else:
            del chosen[-heapq.heapreplace(heap, -number)]
            counts["not_sampled"] += 1
    for number in sorted(chosen):
        yield chosen[number]


def _held_out_key(text: str) -> bytes:
    """A digest of a text as a reader sees it, without regard to case."""
    return hashlib.blake2b(reading(text).casefold().encode(), digest_size=16).digest()
