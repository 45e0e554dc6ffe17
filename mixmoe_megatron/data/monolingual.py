"""Stage-1 data: monolingual text to a Megatron token file, one document a line (or a page), EOS behind each.

A document's tokens are those of its text with the BOS that the tokenizer adds by itself, as a prompt has it, and EOS.
`GPTDataset` packs the documents into samples of the sequence length.

Source: Mix-MoE (arXiv:2605.24681) section IV; the filter on the number of tokens is decision "stage-1 text filter".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched, groupby
from pathlib import Path
from typing import Any

from mixmoe_megatron.data.corpus import (
    Deduplicator,
    clean,
    drop,
    has_control_characters,
    read_lines,
    read_rows,
    reading,
)
from mixmoe_megatron.data.storage import Document, build_token_file, read_manifest
from mixmoe_megatron.data.tokenizers import TextTokenizer
from mixmoe_megatron.errors import MixMoEError

BATCH_DOCUMENTS = 1000


@dataclass(frozen=True)
class MonolingualOptions:
    """How text becomes documents.

    Attributes:
        min_tokens: A document is kept when it has more tokens than this, BOS and EOS not counted.
        columns: None: a file is plain text. One column of TSV or JSONL: its text. Several: their texts in turn.
        group_by: Column whose equal, consecutive values join rows to one document, a line a text.
        keep_duplicates: Keep a document that came before.
    """

    min_tokens: int = 10
    columns: tuple[str, ...] | None = None
    group_by: str | None = None
    keep_duplicates: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            MixMoEError: min_tokens is negative, or group_by comes without columns.
        """
        if self.min_tokens < 0:
            raise MixMoEError("--min-tokens must not be negative.")
        if self.group_by is not None and not self.columns:
            raise MixMoEError("--group-by needs --columns: plain text has no columns.")


def build_monolingual(
    inputs: Sequence[str | Path],
    tokenizer: TextTokenizer,
    prefix: str | Path,
    options: MonolingualOptions | None = None,
) -> dict[str, Any]:
    """Write P.bin, P.idx and P.json from text files.

    Args:
        inputs: Plain text, TSV with a header, or JSONL; compressed or not.
        tokenizer: The model's tokenizer.
        prefix: P, the output path without suffix.
        options: None for the defaults.

    Returns:
        The manifest. Its counts: `read` texts; texts dropped as `empty`, `control_character` or `special_token`;
        documents dropped as `duplicate` or `too_short`; documents `kept`.

    Raises:
        MixMoEError: An input is unreadable or lacks a column, or no document is left.
    """
    options = options or MonolingualOptions()
    counts: Counter[str] = Counter(read=0, kept=0)
    documents = monolingual_documents(inputs, tokenizer, options, counts)
    how = {"kind": "monolingual", "options": asdict(options), "counts": counts}
    return build_token_file(prefix, tokenizer, inputs, documents, how)


def blend_weights(prefixes: Sequence[str | Path], temperature: float) -> list[float]:
    """Return each token file's share of a blend, proportional to its tokens to the power of 1 / temperature.

    Args:
        prefixes: Paths without suffix.
        temperature: 1: as many of each file as it has; higher: more of the small files; without end, all alike.

    Raises:
        MixMoEError: The temperature is below 1, or a file is missing or not monolingual.
    """
    if not temperature >= 1:
        raise MixMoEError(f"--temperature must be 1 or more, not {temperature}.")
    tokens = [read_manifest(prefix, kind="monolingual")["tokens"] for prefix in prefixes]
    powers = [number ** (1 / temperature) for number in tokens]
    return [power / sum(powers) for power in powers]


def monolingual_documents(
    inputs: Sequence[str | Path], tokenizer: TextTokenizer, options: MonolingualOptions, counts: Counter[str]
) -> Iterator[Document]:
    """Yield ([ids with EOS], 0) of each document that is long enough.

    Args:
        inputs: as for `build_monolingual`.
        tokenizer: The model's tokenizer.
        options: Columns and filters.
        counts: What is read and dropped is added here.

    Raises:
        MixMoEError: An input is unreadable or lacks a column.
    """
    for texts in batched(_texts(inputs, tokenizer, options, counts), BATCH_DOCUMENTS):
        for ids in tokenizer.encode(texts, add_special_tokens=True):
            if len(ids) - (tokenizer.bos_id is not None) > options.min_tokens:
                yield [[*ids, tokenizer.eos_id]], 0
            else:
                drop(counts, "too_short")


def _texts(
    inputs: Sequence[str | Path], tokenizer: TextTokenizer, options: MonolingualOptions, counts: Counter[str]
) -> Iterator[str]:
    """Yield the documents of all inputs, duplicates left out."""
    seen = Deduplicator()
    for path in inputs:
        for texts in _raw_documents(path, options):
            document = "\n".join(_usable_texts(texts, tokenizer, counts))
            if not document:
                continue
            if options.keep_duplicates or seen.is_new(document):
                yield document
            else:
                drop(counts, "duplicate")


def _raw_documents(path: str | Path, options: MonolingualOptions) -> Iterator[list[str]]:
    """Yield the texts of each document of a file: a line, a row, or the rows of a page."""
    if not options.columns:
        for _, line in read_lines(path):
            yield [line]
        return
    key = options.group_by
    rows = read_rows(path, options.columns if key is None else (*options.columns, key))
    for _, group in groupby(rows, key=lambda row: row[0] if key is None else row[1][key]):
        yield [row[column] for _, row in group for column in options.columns]


def _usable_texts(texts: Sequence[str], tokenizer: TextTokenizer, counts: Counter[str]) -> Iterator[str]:
    """Yield the cleaned texts that pass the text filters; count the others."""
    for text in texts:
        counts["read"] += 1
        text = clean(text)
        if not reading(text):
            drop(counts, "empty")
        elif has_control_characters(text):
            drop(counts, "control_character")
        elif tokenizer.holds_control_token(text):
            drop(counts, "special_token")
        else:
            yield text
