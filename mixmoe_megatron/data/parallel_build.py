"""Stage-2 data: translation pairs to a token file of (prompt, target + EOS) documents.

A document has two sequences: the prompt's tokens as they are at generation, and the target's tokens with EOS. The mode
stored with each sequence is the number of the translation direction in the manifest's `directions`, so that statistics
per direction stay possible. `parallel.ParallelDataset` reads what is built here.

Source: Mix-MoE (arXiv:2605.24681) section IV. Deviates: D12, D13 (model/README.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import batched
from pathlib import Path
from sys import maxsize
from typing import Any

from mixmoe_megatron.data.corpus import Deduplicator, clean, drop, read_rows
from mixmoe_megatron.data.languages import check_language
from mixmoe_megatron.data.monolingual import MonolingualOptions, monolingual_documents
from mixmoe_megatron.data.preparation.filters import FilterOptions, why_dropped
from mixmoe_megatron.data.prompts import PromptTemplate, encode_pairs
from mixmoe_megatron.data.storage import Document, build_token_file
from mixmoe_megatron.data.tokenizers import TextTokenizer
from mixmoe_megatron.errors import MixMoEError

BATCH_PAIRS = 1000
#: In the place of a direction: text that is read beside pairs.
TEXT = "text"


@dataclass(frozen=True)
class ParallelOptions:
    """How rows become translation pairs.

    Attributes:
        source_language: Language code of the source side.
        target_language: Language code of the target side.
        source_column: Column (TSV) or key (JSONL) of the source; None: the source language's code.
        target_column: The same for the target.
        both_directions: Write each pair in both directions, source to target first.
        min_words: Least words of either side (Chinese and Japanese: characters).
        max_words: Most words of either side.
        max_tokens: Most tokens of prompt, target and EOS together: the sequence length plus one; None: no limit.
        keep_duplicates: Keep a pair that came before.
        template: The prompt.
    """

    source_language: str
    target_language: str
    source_column: str | None = None
    target_column: str | None = None
    both_directions: bool = False
    min_words: int = 1
    max_words: int = 200
    max_tokens: int | None = None
    keep_duplicates: bool = False
    template: PromptTemplate = field(default_factory=PromptTemplate)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            MixMoEError: A language is unknown or both are the same, or a limit makes no sense.
        """
        if check_language(self.source_language) == check_language(self.target_language):
            raise MixMoEError(f"Source and target language are both '{self.source_language}'.")
        if self.columns[0] == self.columns[1]:
            raise MixMoEError(f"Source and target column are both '{self.columns[0]}'.")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise MixMoEError("--max-tokens must be 2 or more.")
        _ = self.filters  # checks the word limits

    @property
    def languages(self) -> tuple[str, str]:
        """The codes of source and target."""
        return self.source_language, self.target_language

    @property
    def filters(self) -> FilterOptions:
        """The limits of either side's words; there is none of its characters, which --max-tokens sees to.

        Raises:
            MixMoEError: They make no sense.
        """
        return FilterOptions(self.min_words, self.max_words, max_characters=maxsize)

    @property
    def columns(self) -> tuple[str, str]:
        """The columns of source and target."""
        return self.source_column or self.source_language, self.target_column or self.target_language

    @property
    def directions(self) -> list[str]:
        """The directions written, such as ["de-en", "en-de"]; a document's mode is its place in this list."""
        forward, backward = "-".join(self.languages), "-".join(reversed(self.languages))
        return [forward, backward] if self.both_directions else [forward]


def build_parallel(
    inputs: Sequence[str | Path], tokenizer: TextTokenizer, prefix: str | Path, options: ParallelOptions
) -> dict[str, Any]:
    """Write P.bin, P.idx and P.json from translation pairs.

    Args:
        inputs: TSV with a header, or JSONL; compressed or not.
        tokenizer: The model's tokenizer.
        prefix: P, the output path without suffix.
        options: Languages, columns, filters and prompt.

    Returns:
        The manifest. Its counts: pairs `read`, and dropped for the reasons of `filters.why_dropped`, or as
        `special_token` or `duplicate`; documents dropped as `too_many_tokens`, `kept`, and `target_encoded_alone` (see
        prompts.py).

    Raises:
        MixMoEError: An input is unreadable or lacks a column, or no pair is left.
    """
    counts: Counter[str] = Counter(read=0, kept=0)
    per_direction: Counter[str] = Counter()

    def documents() -> Iterator[Document]:
        for sequences, mode in parallel_documents(inputs, tokenizer, options, counts):
            per_direction[options.directions[mode]] += 1
            yield sequences, mode

    how = {"options": asdict(options), "directions": options.directions, "documents_per_direction": per_direction}
    return build_token_file(prefix, tokenizer, inputs, documents(), {"kind": "parallel", "counts": counts, **how})


def build_text_beside_pairs(
    inputs: Sequence[str | Path],
    tokenizer: TextTokenizer,
    prefix: str | Path,
    max_tokens: int,
    options: MonolingualOptions | None = None,
) -> dict[str, Any]:
    """Write P.bin, P.idx and P.json from monolingual text, to train on together with pairs: mixed data, or a review.

    A document's first token stands where a pair has its prompt, and all others count in the loss. A long document
    becomes several, each from the last token of the one before, so that every token is predicted once.

    Args:
        inputs: Plain text, TSV with a header, or JSONL; compressed or not.
        tokenizer: The model's tokenizer.
        prefix: P, the output path without suffix.
        max_tokens: Most tokens of a document: the sequence length plus one.
        options: None for the defaults.

    Returns:
        The manifest, with the counts of `build_monolingual`; `kept` are the parts of the documents.

    Raises:
        MixMoEError: max_tokens is below 2, an input is unreadable or lacks a column, or no document is left.
    """
    if max_tokens < 2:
        raise MixMoEError("--beside-pairs must be 2 or more.")
    options, counts = options or MonolingualOptions(), Counter[str](read=0, kept=0)

    def documents() -> Iterator[Document]:
        for (ids,), mode in monolingual_documents(inputs, tokenizer, options, counts):
            for start in range(0, len(ids) - 1, max_tokens - 1):
                part = ids[start : start + max_tokens]
                yield [part[:1], part[1:]], mode

    how = {"options": asdict(options) | {"max_tokens": max_tokens}, "directions": [TEXT]}
    return build_token_file(prefix, tokenizer, inputs, documents(), {"kind": "parallel", "counts": counts, **how})


def parallel_documents(
    inputs: Sequence[str | Path], tokenizer: TextTokenizer, options: ParallelOptions, counts: Counter[str]
) -> Iterator[Document]:
    """Yield ([prompt ids, target ids with EOS], place of the direction in `options.directions`) of each pair to learn.

    Args:
        inputs: as for `build_parallel`.
        tokenizer: The model's tokenizer.
        options: Languages, columns, filters and prompt.
        counts: What is read and dropped is added here.

    Raises:
        MixMoEError: An input is unreadable or lacks a column.
    """
    for pairs in batched(_usable_pairs(inputs, tokenizer, options, counts), BATCH_PAIRS):
        for mode, prompt_ids, target_ids in _encode(pairs, tokenizer, options, counts):
            if options.max_tokens is not None and len(prompt_ids) + len(target_ids) > options.max_tokens:
                drop(counts, "too_many_tokens")
                continue
            yield [prompt_ids, target_ids], mode


def _usable_pairs(
    inputs: Sequence[str | Path], tokenizer: TextTokenizer, options: ParallelOptions, counts: Counter[str]
) -> Iterator[tuple[str, ...]]:
    """Yield the cleaned pairs that pass the text filters; count the others.

    A line break counts as a control character: only the first line of what a model generates is its translation.
    """
    seen, filters = Deduplicator(), options.filters
    for path in inputs:
        for _, row in read_rows(path, options.columns):
            counts["read"] += 1
            pair = tuple(clean(row[column]) for column in options.columns)
            reason = why_dropped(pair, options.languages, filters)
            if reason is None and any(map(tokenizer.holds_control_token, pair)):
                reason = "special_token"
            if reason is None and not options.keep_duplicates and not seen.is_new(*pair):
                reason = "duplicate"
            if reason is None:
                yield pair
            else:
                drop(counts, reason)


def _encode(
    pairs: Sequence[tuple[str, ...]], tokenizer: TextTokenizer, options: ParallelOptions, counts: Counter[str]
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield (mode, prompt ids, target ids with EOS) of each pair and direction, a pair's directions together."""
    prompts, targets = [], []
    for pair in pairs:
        for step in (1, -1)[: len(options.directions)]:
            source, target = pair[::step]
            prompts.append(options.template.render(source, *options.languages[::step]))
            targets.append(target)
    encoded = encode_pairs(tokenizer, prompts, targets)
    if encoded.encoded_alone:
        counts["target_encoded_alone"] += encoded.encoded_alone
    for place, (prompt_ids, target_ids) in enumerate(zip(encoded.prompts, encoded.targets, strict=True)):
        yield place % len(options.directions), prompt_ids, target_ids
