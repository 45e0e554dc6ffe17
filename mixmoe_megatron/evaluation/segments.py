"""Test data: translation segments from a table (TSV or JSONL) and monolingual lines, and the choice of a subset."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmoe_megatron.data.corpus import is_utf8, one_line, read_lines, reading
from mixmoe_megatron.data.languages import check_language
from mixmoe_megatron.data.preparation.sources import Source
from mixmoe_megatron.errors import MixMoEError


@dataclass(frozen=True)
class Direction:
    """One translation direction and its aligned segments.

    Attributes:
        source_language: Code such as ``de``.
        target_language: Code such as ``en``.
        sources: One text a segment.
        references: The reference translation of each source, same length and order.
        test_set: Name that tells several test sets of one direction apart; may be empty.
    """

    source_language: str
    target_language: str
    sources: list[str]
    references: list[str]
    test_set: str = ""

    @property
    def name(self) -> str:
        """The direction as in ``de-en``, with the test set's name where it has one: ``de-en@flores``."""
        suffix = f"@{self.test_set}" if self.test_set else ""
        return f"{self.source_language}-{self.target_language}{suffix}"

    def reverse(self) -> Direction:
        """Return the same segments, translated the other way."""
        return Direction(self.target_language, self.source_language, self.references, self.sources, self.test_set)


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


def read_test(value: str, columns: Sequence[str | None], *, limit: int = 0, seed: int = 0) -> Direction:
    """Read a test set as the command line names it: PAIR[@NAME]=WHERE.

    Args:
        value: PAIR is ``de-en``. WHERE is a table (TSV with a header, JSONL, Parquet; compressed or not), or
            ``sacrebleu:wmt17``, or ``flores:DIRECTORY`` (its devtest). NAME tells several sets of a pair apart.
        columns: Columns of source and target in tables; None: the language codes.
        limit: Segments to take (see `select_subset`); 0 takes all.
        seed: Of the selection.

    Raises:
        MixMoEError: The value is not of this form, or see `read_direction`.
    """
    place, _, where = value.partition("=")
    pair, at, name = place.partition("@")
    languages = pair.split("-")
    if len(languages) != 2 or not where or (at and not re.fullmatch(r"[A-Za-z0-9_.]+", name)):
        raise MixMoEError(f"--test takes PAIR[@NAME]=FILE, such as de-en=test.tsv.gz, not {value!r}.")
    kind, _, rest = ("", "", "") if os.path.lexists(where) else where.partition(":")
    if kind == "sacrebleu" and rest:
        source = Source(sacrebleu=rest, config=pair)
    elif kind == "flores" and rest:
        source = Source(flores=rest, split="devtest")
    else:
        named = {code: column or code for code, column in zip(languages, columns, strict=True)}
        source = Source(files=(where,), columns=named)
    return read_direction(source, (languages[0], languages[1]), name, limit=limit, seed=seed)


def read_direction(
    source: Source, languages: tuple[str, str], test_set: str = "", *, limit: int = 0, seed: int = 0
) -> Direction:
    """Read a translation test set.

    Args:
        source: Where it is.
        languages: Language codes of source and target.
        test_set: Its name; may be empty.
        limit: Segments to take (see `select_subset`); 0 takes all.
        seed: Of the selection.

    Raises:
        MixMoEError: Unknown or equal languages, unreadable source, missing column, a broken row or an empty side, or no
            segment at all.
    """
    if check_language(languages[0]) == check_language(languages[1]):
        raise MixMoEError(f"Source and target language are both '{languages[0]}'.")
    where = source.label()
    pairs = []
    for number, row in enumerate(source.rows(languages), start=1):
        if row is None:
            raise MixMoEError(f"{where}, segment {number}: the row is broken (another number of columns, or no text).")
        if not all(map(is_utf8, row)):
            raise MixMoEError(f"{where}, segment {number}: not UTF-8.")
        if empty := [code for code, text in zip(languages, row, strict=True) if not reading(text)]:
            raise MixMoEError(f"{where}, segment {number}: the side '{empty[0]}' is empty.")
        pairs.append([one_line(text) for text in row])
    if not pairs:
        raise MixMoEError(f"{where} holds no test segment: give a test set with at least one.")
    chosen = select_subset(pairs, limit, seed)
    return Direction(*languages, [pair[0] for pair in chosen], [pair[1] for pair in chosen], test_set)


def read_monolingual(path: str | Path, *, limit: int = 0, seed: int = 0, max_bytes: int = 0) -> list[str]:
    """Read one text from each line that does not look empty.

    Args:
        path: A text file, compressed or not.
        limit: Lines to take (see `select_subset`); 0 takes all.
        seed: Of the selection.
        max_bytes: Read the first texts alone, which have so many UTF-8 bytes together, the last one cut; 0 reads all.

    Raises:
        MixMoEError: The file is unreadable or holds no text.
    """
    lines = (text for _, line in read_lines(path) if reading(line) and (text := one_line(line)))
    texts = list(_first_bytes(lines, max_bytes) if max_bytes else lines)
    if not texts:
        raise MixMoEError(f"{path} holds no text: give a file with a text on each line.")
    return select_subset(texts, limit, seed)


def _first_bytes(texts: Iterable[str], left: int) -> Iterator[str]:
    for text in texts:
        if first := text.encode("utf-8")[:left].decode("utf-8", "ignore"):
            yield first
        left -= len(text.encode("utf-8"))
        if left <= 0:
            return


def named_values(values: list[str], option: str, kind: str) -> dict[str, str]:
    """Split NAME=VALUE values of a repeatable option.

    Args:
        values: As given on the command line.
        option: The option's name, for messages.
        kind: What VALUE is called there, such as PATH.

    Raises:
        MixMoEError: A value is not NAME=VALUE, or a name comes twice.
    """
    result: dict[str, str] = {}
    for value in values:
        name, _, content = value.partition("=")
        if not (name and content):
            raise MixMoEError(f"{option} takes NAME={kind}, not {value!r}.")
        if name in result:
            raise MixMoEError(f"{option} names {name!r} twice.")
        result[name] = content
    return result


def named_numbers(values: list[str], option: str) -> dict[str, float]:
    """Split NAME=NUMBER values of a repeatable option, see `named_values`.

    Raises:
        MixMoEError: As `named_values`, or a number is none.
    """
    numbers = named_values(values, option, "NUMBER")
    try:
        return {name: float(number) for name, number in numbers.items()}
    except ValueError as error:
        raise MixMoEError(f"{option} takes NAME=NUMBER ({error}).") from error


def named_paths(values: list[str], option: str) -> dict[str, Path]:
    """Split NAME=PATH values of a repeatable option, see `named_values`."""
    return {name: Path(path) for name, path in named_values(values, option, "PATH").items()}


def sha256_of_texts(texts: Sequence[str]) -> str:
    """Return a sha256 (64 hexadecimal digits) of texts and their boundaries: did two runs see the same data?"""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()
