"""Where text comes from: local files of any usual format, aligned plain files, the Hugging Face hub, FLORES, sacreBLEU.

A source yields rows, each a tuple with one text for each column asked for, or None for a row that cannot be read as
such a tuple (broken JSON, a wrong number of columns, an empty cell of a Parquet file): the caller counts it. What is
wrong with the source itself (no such file, no such column, sides of different length, mostly damaged lines) is an
error.

Bytes that are not UTF-8 arrive as lone surrogates (Python's "surrogateescape"): the filters count and drop them.
"""

from __future__ import annotations

import glob
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from mixmoe_megatron.data.corpus import Row, read_lines, read_table, rows_of_records
from mixmoe_megatron.data.languages import flores_code
from mixmoe_megatron.data.preparation.words import defaults_of, from_words
from mixmoe_megatron.data.text_files import format_of
from mixmoe_megatron.errors import MixMoEError

_KINDS = ("files", "aligned", "hub", "flores", "sacrebleu")


@dataclass(frozen=True)
class Source:
    """One source of one split of one language or pair, as a protocol file describes it.

    Exactly one of the first five is set.

    Attributes:
        files: Paths or glob patterns of TSV (with a header), JSONL, Parquet or plain text, compressed or not; a path
            that exists is no pattern.
        aligned: Language code -> plain text file, line by line translations of each other (Moses).
        hub: Dataset on the Hugging Face hub, a local directory of one, or a builder such as "text".
        flores: Directory of FLORES-200 (it holds dev/ and devtest/).
        sacrebleu: Name of a sacreBLEU test set, such as "wmt17", or several joined by "+".
        columns: Language code -> column. None: the language codes; for text of one language "text".
        config: Configuration of the hub dataset; language pair of the sacreBLEU test set (None: either direction).
        split: Split of the hub dataset or of FLORES.
        data_files: Passed on to `datasets.load_dataset`: addresses for a builder.
        revision: Of the hub dataset; a commit makes the run repeatable.
        max_rows: Read at most so many rows; 0 reads all.
    """

    files: tuple[str, ...] = ()
    aligned: Mapping[str, str] | None = None
    hub: str | None = None
    flores: str | None = None
    sacrebleu: str | None = None
    columns: Mapping[str, str] | None = None
    config: str | None = None
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    revision: str | None = None
    max_rows: int = 0

    def __post_init__(self) -> None:
        """Check the description.

        Raises:
            MixMoEError: It names no source, or two, or a negative number of rows.
        """
        given = [kind for kind in _KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise MixMoEError(f"A source names exactly one of {', '.join(_KINDS)}; got {', '.join(given) or 'none'}.")
        if self.max_rows < 0:
            raise MixMoEError(f"max_rows must be 0 (all rows) or more, not {self.max_rows}.")

    @classmethod
    def from_value(cls, value: Any, where: str) -> Source:
        """Read a source from a protocol file: a path, a list of paths, or a mapping of this class's attributes.

        Args:
            value: The YAML value.
            where: Its place in the protocol, for messages.

        Raises:
            MixMoEError: It is none of these, or has an unknown key or a value of another kind.
        """
        if isinstance(value, str):
            return cls(files=(value,))
        if isinstance(value, list) and all(isinstance(path, str) for path in value):
            return cls(files=tuple(value))
        if not isinstance(value, dict):
            raise MixMoEError(f"{where}: a source is a path, a list of paths or a mapping, not {value!r}.")
        defaults_of(cls, value, where)  # before what is empty is left out
        value = {name: tuple(part) if isinstance(part, list) else part for name, part in value.items() if part}
        for name, part in value.items():
            by_language = name in ("aligned", "columns")
            words = part if isinstance(part, tuple) else part.values() if isinstance(part, dict) else (part,)
            if isinstance(part, dict) != by_language or not all(isinstance(word, str) for word in words):
                form = "a mapping of language codes" if by_language else "a word, or a list of files"
                raise MixMoEError(f"{where}: {name} is {form}, not {part!r}.")
        if isinstance(value.get("files"), str):
            value["files"] = (value["files"],)
        return from_words(cls, value, where)

    def label(self) -> str:
        """Return what to call the source in a message."""
        if self.aligned is not None:
            return ", ".join(self.aligned.values())
        return ", ".join(self.files) or str(self.hub or self.flores or self.sacrebleu)

    def paths(self) -> list[str]:
        """Return the local files: each path as it is, the files of each pattern sorted.

        Raises:
            MixMoEError: A path or pattern names no file.
        """
        found: list[str] = []
        for pattern in [*self.files, *(self.aligned or {}).values()]:
            matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern)) or [pattern]
            missing = [path for path in matches if not Path(path).is_file()]
            if missing:
                raise MixMoEError(f"{missing[0]} does not exist or is not a file.")
            found += matches
        return found

    def rows(self, languages: Sequence[str]) -> Iterator[Row]:
        """Yield rows with one text for each language, in the order of `languages`.

        Args:
            languages: One code, or two of a pair.

        Raises:
            MixMoEError: See the module's text.
        """
        return islice(self._all_rows(languages), self.max_rows or None)

    def _all_rows(self, languages: Sequence[str]) -> Iterator[Row]:
        if self.files:
            for path in self.paths():
                yield from _read_file(path, self._columns(languages))
        elif self.aligned is not None:
            if missing := set(languages) - set(self.aligned):
                raise MixMoEError(f"The aligned files {dict(self.aligned)} lack the language {sorted(missing)[0]!r}.")
            self.paths()
            yield from _read_aligned([self.aligned[code] for code in languages])
        elif self.flores is not None:
            sides = [str(Path(self.flores, self.split, f"{flores_code(code)}.{self.split}")) for code in languages]
            if absent := [path for path in sides if not Path(path).is_file()]:
                raise MixMoEError(
                    f"There is no {absent[0]}: give FLORES-200's directory, with dev/, devtest/ and this language."
                )
            yield from _read_aligned(sides)
        elif self.sacrebleu is not None:
            yield from _read_sacrebleu(self.sacrebleu, self.config, languages)
        else:
            yield from self._read_hub(self._columns(languages))

    def _columns(self, languages: Sequence[str]) -> list[str]:
        if self.columns is None:
            return list(languages) if len(languages) > 1 else ["text"]
        if missing := set(languages) - set(self.columns):
            raise MixMoEError(f"columns {dict(self.columns)} name no column of the language {sorted(missing)[0]!r}.")
        return [self.columns[code] for code in languages]

    def _read_hub(self, columns: list[str]) -> Iterator[Row]:
        from datasets import load_dataset

        assert self.hub is not None
        if os.path.isdir(self.hub) and glob.has_magic(self.hub):
            raise MixMoEError(f"datasets takes *, ? and [ in {self.hub} for a pattern: rename that directory.")
        names = (self.data_files,) if isinstance(self.data_files, str) else self.data_files
        data_files = names and [glob.escape(os.path.abspath(name)) if os.path.lexists(name) else name for name in names]
        try:
            dataset = load_dataset(
                self.hub, self.config, split=self.split, data_files=data_files, revision=self.revision, streaming=True
            )
            yield from _texts(dataset, columns, f"dataset {self.hub}")
        except MixMoEError:
            raise
        except Exception as error:  # datasets raises many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise MixMoEError(f"Cannot read the dataset {self.hub} ({self.config or 'default'}): {reason}") from error


def _read_file(path: str, columns: list[str]) -> Iterator[Row]:
    kind = format_of(path)
    if kind == ".parquet":
        return _read_parquet(path, columns)
    if kind in (".tsv", ".jsonl"):
        return (row for _, row in read_table(path, columns, lenient=True))
    if len(columns) > 1:
        raise MixMoEError(f"{path}: a pair of languages needs .tsv, .jsonl or .parquet, or two `aligned` files.")
    return ((line,) for _, line in read_lines(path, errors="surrogateescape"))


def _read_parquet(path: str, columns: list[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = ["translation"] if "translation" in names and columns[0] not in names else columns
            if missing := [column for column in wanted if column not in names]:
                raise MixMoEError(f"{path}: no column '{missing[0]}'; it has {', '.join(names)}: name one of these.")
            records = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
            yield from _texts(records, columns, path)
    except pyarrow.ArrowException as error:
        raise MixMoEError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error


def _texts(records: Iterable[Any], columns: list[str], where: str) -> Iterator[Row]:
    return (row for _, row in rows_of_records(enumerate(records), columns, where))


def _read_aligned(paths: list[str]) -> Iterator[Row]:
    sides = [read_lines(path, errors="surrogateescape") for path in paths]
    number = 0
    for number, lines in enumerate(zip_longest(*sides), start=1):
        if None in lines:
            short = paths[lines.index(None)]
            raise MixMoEError(f"{short} ends after line {number - 1}, the other side goes on: they are not aligned.")
        yield tuple(line for _, line in lines)


def _read_sacrebleu(names: str, pair: str | None, languages: Sequence[str]) -> Iterator[Row]:
    """Sources and first references of test sets, in the direction in which sacreBLEU has them."""
    from sacrebleu.utils import SACREBLEU_DIR, get_langpairs_for_testset, get_reference_files, get_source_file

    if len(languages) != 2:
        raise MixMoEError(f"The sacreBLEU test set {names} holds pairs of languages, not one.")
    forward, backward = "-".join(languages), "-".join(reversed(languages))
    for name in names.split("+"):
        known = get_langpairs_for_testset(name)
        found = [wanted for wanted in ((pair,) if pair else (forward, backward)) if wanted in known]
        if not found or found[0] not in (forward, backward):
            has = f"it has {', '.join(known)}" if known else "`sacrebleu --list` names those it has"
            raise MixMoEError(f"sacreBLEU has no test set {name!r} for {pair or forward}: {has}.")
        try:
            sides = [str(get_source_file(name, found[0])), str(get_reference_files(name, found[0])[0])]
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, SystemExit) as error:
            raise MixMoEError(
                f"Cannot fetch the sacreBLEU test set {name} for {found[0]} ({error}): delete {SACREBLEU_DIR}/{name} "
                "and try again, or copy that directory from a machine where "
                f"`sacrebleu -t {name} -l {found[0]} --echo src` works."
            ) from error
        yield from _read_aligned(sides if found[0] == forward else sides[::-1])
