"""Streaming readers of text corpora (plain, TSV with a header, JSONL; compressed or not) and the text filters.

Text is NFC, without outer whitespace. A text that looks empty counts as empty, texts that look alike as equal (see
`reading`). Nothing is dropped in silence: every reader and filter counts into a `Counter`
whose keys are `read`, `kept` and one `dropped_<reason>` for each reason.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixmoe_megatron.data.text_files import check_is_text, format_of, open_packed
from mixmoe_megatron.errors import MixMoEError

#: A text for each column; None for a row that cannot be read as such.
Row = tuple[str, ...] | None
BLANKS = "\t\n"
#: what stands for a byte that was not UTF-8 ("surrogateescape"), and other halves of characters
_SURROGATE = re.compile("[\ud800-\udfff]")
#: control characters, and what else str.splitlines breaks at
_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]+")
#: Control characters, Unicode's Default_Ignorable_Code_Point, annotation marks, the blank pattern of Braille
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
_NOT_TEXT = (
    "are not UTF-8 text: give a text file; one in another encoding is converted by iconv -f LATIN1 -t UTF-8, with its "
    "encoding's name"
)
_DAMAGED_LINES = 10  # so many damaged lines are always borne with, if there are more others
_LINES_TO_JUDGE = 1000  # from so many lines on a file is judged before its end


def read_lines(path: str | Path, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """Read a UTF-8 text file line by line, unpacked where `text_files.open_packed` knows how.

    Args:
        path: The file.
        errors: What to do with bytes that are not UTF-8, as `bytes.decode` takes it.

    Yields:
        The line number, from 1, and the line without its end.

    Raises:
        MixMoEError: The file is missing, its compressed data is broken, it is no text file, or it is not UTF-8: a
            single line (errors "strict"), or so many lines that the file as a whole is not (otherwise, and for NUL).
    """
    number, compression = 0, ""
    ceiling = DamageCeiling(path, _NOT_TEXT)
    try:
        with open_packed(path) as (stream, compression):
            check_is_text(path, stream, compression)
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors).rstrip("\r\n")
                ceiling.count("\0" in line or (errors != "strict" and not is_utf8(line)))
                yield number, line
        ceiling.check()
    except UnicodeDecodeError as error:
        raise MixMoEError(f"{path}, line {number}: not UTF-8 ({error.reason}).") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if compression and getattr(error, "errno", None) is None:  # not the system, but the unpacker says so
            raise MixMoEError(f"{path}: broken {compression} data after line {number} ({error}).") from error
        raise MixMoEError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error


class DamageCeiling:
    """Counts the damaged lines of a file that is read leniently, and refuses one that is damaged as a whole.

    Args:
        path: The file.
        damage: What is wrong with the lines, after "5 of its first 9 lines".
    """

    def __init__(self, path: str | Path, damage: str) -> None:
        self._path, self._damage = path, damage
        self._lines = self._damaged = 0

    def count(self, damaged: bool) -> None:
        """Count a line.

        Raises:
            MixMoEError: see `check`; long files are judged before their end.
        """
        self._lines += 1
        self._damaged += damaged
        if damaged and self._lines >= _LINES_TO_JUDGE:
            self.check()

    def check(self) -> None:
        """Judge the lines so far.

        Raises:
            MixMoEError: More than a tenth of them are damaged (of a few lines: more than half).
        """
        if self._damaged > max(_DAMAGED_LINES, self._lines // 10) or 2 * self._damaged > self._lines:
            raise MixMoEError(f"{self._path}: {self._damaged} of its first {self._lines} lines {self._damage}.")


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the named columns of a table: JSONL when the name says so (.jsonl, .jsonl.xz ...), else TSV with a header.

    Args:
        path: The file.
        columns: Column names (TSV header) or keys (JSONL).

    Yields:
        The line number, from 1, and {column: text}.

    Raises:
        MixMoEError: A column is missing or a row is broken (names the file and the line), or the file is unreadable,
            or Parquet.
    """
    if format_of(path) == ".parquet":
        raise MixMoEError(f"{path}: give TSV or JSONL; tools/prepare_data.py makes TSV of Parquet.")
    rows = read_table(path, columns)
    return ((number, dict(zip(columns, row, strict=True))) for number, row in rows if row is not None)


def read_table(path: str | Path, columns: Sequence[str], *, lenient: bool = False) -> Iterator[tuple[int, Row]]:
    """Read the named columns of JSONL or of TSV with a header, see `read_rows`.

    Args:
        path: The file.
        columns: Column names (TSV header) or keys (JSONL).
        lenient: A broken row is None, and bytes that are not UTF-8 become lone surrogates, where both are errors
            otherwise.

    Yields:
        The line number, from 1, and the texts in the order of `columns`.

    Raises:
        MixMoEError: A column is missing, a row is broken (names the file and the line; if lenient: so many rows that
            the file as a whole is), or the file is unreadable.
    """
    lines = read_lines(path, errors="surrogateescape" if lenient else "strict")
    if format_of(path) == ".jsonl":
        return rows_of_records(_read_jsonl(path, lines, lenient), columns, path, lenient=lenient)
    return _read_tsv(path, lines, columns, lenient)


def _read_tsv(
    path: str | Path, lines: Iterator[tuple[int, str]], columns: Sequence[str], lenient: bool
) -> Iterator[tuple[int, Row]]:
    number, header_line = next(lines, (0, ""))
    if not number:
        raise MixMoEError(f"{path} is empty: a TSV file begins with a line of column names.")
    header = [clean(name) for name in header_line.split("\t")]
    columns = [clean(name) for name in columns]
    for column in columns:
        if column not in header:
            names = ", ".join(header)
            raise MixMoEError(f"{path}, line 1: no column '{column}' in the header; it has {names}: name one of these.")
    places = [header.index(column) for column in columns]
    ceiling = DamageCeiling(path, f"have another number of columns than the header, which has {len(header)}")
    for number, line in lines:
        cells = line.split("\t")
        broken = len(cells) != len(header)
        if broken and not lenient:
            raise MixMoEError(f"{path}, line {number}: {len(cells)} columns where the header has {len(header)}.")
        ceiling.count(broken)
        yield number, None if broken else tuple(cells[place] for place in places)
    ceiling.check()


def _read_jsonl(path: str | Path, lines: Iterator[tuple[int, str]], lenient: bool) -> Iterator[tuple[int, Any]]:
    ceiling = DamageCeiling(path, "are not JSON: JSONL has one object on each line")
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if not lenient:
                raise MixMoEError(f"{path}, line {number}: not JSON ({error.msg}).") from error
            record = None
        ceiling.count(record is None)
        yield number, record
    ceiling.check()


def rows_of_records(
    records: Iterable[tuple[int, Any]], columns: Sequence[str], where: str | Path, *, lenient: bool = True
) -> Iterator[tuple[int, Row]]:
    """Take the columns of mappings; a pair may lie below "translation", as in the WMT datasets of the hub.

    Args:
        records: A number, and what JSON or a dataset gave.
        columns: The keys.
        where: The file or dataset, for messages.
        lenient: A record without a text in each column is None, where it is an error otherwise.

    Yields:
        The number, and the texts in the order of `columns`.

    Raises:
        MixMoEError: The first record lacks a column, or see `lenient`.
    """
    for place, (number, record) in enumerate(records):
        if isinstance(record, dict) and isinstance(record.get("translation"), dict):
            record = record["translation"]
        if place == 0 and isinstance(record, dict) and (missing := [name for name in columns if name not in record]):
            raise MixMoEError(f"{where}: no column '{missing[0]}'; it has {', '.join(record)}: name one of these.")
        texts: tuple[Any, ...] = tuple(record.get(name) if isinstance(record, dict) else None for name in columns)
        wrong = [name for name, text in zip(columns, texts, strict=True) if not isinstance(text, str)]
        if wrong and not lenient:
            raise MixMoEError(f"{where}, line {number}: no text under the key '{wrong[0]}'.")
        yield number, None if wrong else texts


def clean(text: str) -> str:
    """Return the text in NFC, without outer whitespace and without byte order marks."""
    return unicodedata.normalize("NFC", text).replace("\ufeff", "").strip()


def one_line(text: str) -> str:
    """Return a test text as one line of any file: clean, each run of tabs, line breaks and control characters a blank.

    Nothing else of a test text is changed: its scores are compared with those of others.
    """
    return _CONTROLS.sub(" ", clean(text)).strip()


def reading(text: str) -> str:
    """Return what a reader sees of a text: NFC, without invisible characters, each run of white space one blank.

    Filters compare this, so that texts which look alike count as equal, and one that looks empty as empty.
    """
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return " ".join(text.split())


def is_utf8(text: str) -> bool:
    """Tell whether a text has no lone surrogate."""
    return text.isprintable() or not _SURROGATE.search(text)


def has_control_characters(text: str, allowed: str = BLANKS) -> bool:
    """Tell whether a text holds NUL, another control character, a lone surrogate, or a Unicode line separator.

    Args:
        text: Any text.
        allowed: Control characters that do no harm.
    """
    if text.isprintable():
        return False
    return not is_utf8(text) or any(run.strip(allowed) for run in _CONTROLS.findall(text))


class Deduplicator:
    """Remembers the texts it has seen, as a reader sees them, by a 16-byte digest."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, *texts: str) -> bool:
        """Tell whether this tuple of texts comes for the first time, and remember it."""
        key = "\0".join(map(reading, texts)).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(key, digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def sha256_of_file(path: str | Path) -> str:
    """Return a file's sha256 as 64 hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def drop(counts: Counter[str], reason: str, number: int = 1) -> None:
    """Count dropped items under their reason."""
    counts[f"dropped_{reason}"] += number


def summarise(counts: Counter[str]) -> str:
    """Write counts as one phrase: '12 read, 11 kept, 1 dropped duplicate'."""
    return ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in counts.items())
