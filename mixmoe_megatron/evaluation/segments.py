"""Test data: translation segments from a table (TSV or JSONL) and monolingual lines, and the choice of a subset."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmoe_megatron.data.corpus import clean, read_lines, read_rows
from mixmoe_megatron.data.languages import check_language
from mixmoe_megatron.errors import MixMoEError


@dataclass(frozen=True)
class Direction:
    """One translation direction and its aligned segments.

    Attributes:
        source_language: Code such as ``de``.
        target_language: Code such as ``en``.
        sources: One text a segment.
        references: The reference translation of each source, same length and order.
    """

    source_language: str
    target_language: str
    sources: list[str]
    references: list[str]

    @property
    def name(self) -> str:
        """The direction as in ``de-en``."""
        return f"{self.source_language}-{self.target_language}"

    def reverse(self) -> Direction:
        """Return the same segments, translated the other way."""
        return Direction(self.target_language, self.source_language, self.references, self.sources)


def select_subset[Item](items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """Take the first `limit` items of a seeded shuffle and put them back into file order.

    The choice depends on the number of items, `limit` and `seed` only, so all systems see the same segments.

    Args:
        items: Everything the file holds.
        limit: How many to keep; 0 keeps all.
        seed: Of Python's Mersenne Twister shuffle.

    Raises:
        MixMoEError: `limit` is negative.
    """
    if limit < 0:
        raise MixMoEError(f"A limit must be 0 (everything) or more, not {limit}.")
    if limit == 0 or limit >= len(items):
        return list(items)
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[index] for index in sorted(order[:limit])]


def read_direction(
    path: str | Path, languages: tuple[str, str], columns: tuple[str, str], *, limit: int = 0, seed: int = 0
) -> Direction:
    """Read a translation test set.

    Args:
        path: A table as `data.corpus.read_rows` takes it: TSV with a header, or JSONL; gzip or not.
        languages: Language codes of source and target.
        columns: Names of the columns that hold the source and the reference.
        limit: Segments to take (see `select_subset`); 0 takes all.
        seed: Of the selection.

    Raises:
        MixMoEError: Unknown or equal languages, unreadable file, missing column, empty cell, or no segment at all.
    """
    if check_language(languages[0]) == check_language(languages[1]):
        raise MixMoEError(f"Source and target language are both '{languages[0]}'.")
    pairs = []
    for number, row in read_rows(path, columns):
        for column in columns:
            if not row[column].strip():
                raise MixMoEError(f"{path}, line {number}: the column '{column}' is empty.")
        pairs.append((clean(row[columns[0]]), clean(row[columns[1]])))
    if not pairs:
        raise MixMoEError(f"{path} holds no test segment.")
    chosen = select_subset(pairs, limit, seed)
    return Direction(*languages, sources=[pair[0] for pair in chosen], references=[pair[1] for pair in chosen])


def read_monolingual(path: str | Path, *, limit: int = 0, seed: int = 0) -> list[str]:
    """Read one text from each line that is not empty.

    Args:
        path: A text file, gzip or not.
        limit: Lines to take (see `select_subset`); 0 takes all.
        seed: Of the selection.

    Raises:
        MixMoEError: The file is unreadable or holds no text.
    """
    texts = [text for _, line in read_lines(path) if (text := clean(line))]
    if not texts:
        raise MixMoEError(f"{path} holds no text.")
    return select_subset(texts, limit, seed)


def named_paths(values: list[str], option: str) -> dict[str, Path]:
    """Split NAME=PATH values of a repeatable option.

    Args:
        values: As given on the command line.
        option: The option's name, for messages.

    Raises:
        MixMoEError: A value is not NAME=PATH, or a name comes twice.
    """
    result: dict[str, Path] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path):
            raise MixMoEError(f"{option} takes NAME=PATH, not {value!r}.")
        if name in result:
            raise MixMoEError(f"{option} names {name!r} twice.")
        result[name] = Path(path)
    return result


def sha256_of_texts(texts: Sequence[str]) -> str:
    """Return a sha256 (64 hexadecimal digits) of texts and their boundaries: did two runs see the same data?"""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()
