"""Stage-2 data: translation pairs to a token file of (prompt, target + EOS) documents.

A document has two sequences: the prompt's tokens as they are at generation, and the target's tokens with EOS. The mode
stored with each sequence is the number of the translation direction in the manifest's `directions`, so that statistics
per direction stay possible. `parallel.ParallelDataset` reads what is built here.

Source: Mix-MoE (arXiv:2605.24681) section IV. Deviates: D12, D13 (model/README.md).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mixmoe_megatron.data.corpus import (
    Deduplicator,
    batched,
    clean,
    drop,
    has_control_characters,
    read_rows,
    reading,
    summarise,
)
from mixmoe_megatron.data.languages import check_language, count_words
from mixmoe_megatron.data.prompts import PromptTemplate, encode_pairs
from mixmoe_megatron.data.storage import TokenFileWriter, describe_sources
from mixmoe_megatron.data.tokenizers import TextTokenizer
from mixmoe_megatron.errors import MixMoEError

logger = logging.getLogger(__name__)
BATCH_PAIRS = 1000


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
        if not 1 <= self.min_words <= self.max_words:
            raise MixMoEError(f"Word limits {self.min_words}..{self.max_words} must be 1 or more and in order.")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise MixMoEError("--max-tokens must be 2 or more.")

    @property
    def columns(self) -> tuple[str, str]:
        """The columns of source and target."""
        return self.source_column or self.source_language, self.target_column or self.target_language

    @property
    def directions(self) -> list[str]:
        """The directions written, such as ["de-en", "en-de"]; a document's mode is its place in this list."""
        forward = f"{self.source_language}-{self.target_language}"
        backward = f"{self.target_language}-{self.source_language}"
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
        The manifest. Its counts: pairs `read`, and dropped as `empty`, `control_character`, `special_token`,
        `too_few_words`, `too_many_words` or `duplicate`; documents dropped as `too_many_tokens`, `kept`, and
        `target_encoded_alone` (see prompts.py).

    Raises:
        MixMoEError: An input is unreadable or lacks a column, or no pair is left.
    """
    sources = describe_sources(inputs)
    counts: Counter[str] = Counter(read=0, kept=0)
    per_direction: Counter[str] = Counter()
    with TokenFileWriter(prefix, tokenizer.vocab_size, with_modes=True) as writer:
        for pairs in batched(_usable_pairs(inputs, tokenizer, options, counts), BATCH_PAIRS):
            for mode, prompt_ids, target_ids in _encode(pairs, tokenizer, options, counts):
                if options.max_tokens is not None and len(prompt_ids) + len(target_ids) > options.max_tokens:
                    drop(counts, "too_many_tokens")
                    continue
                writer.add([prompt_ids, target_ids], mode)
                counts["kept"] += 1
                per_direction[options.directions[mode]] += 1
        if not counts["kept"]:
            raise MixMoEError(f"No pair is left of {', '.join(map(str, inputs))}: {summarise(counts)}.")
        manifest = writer.commit(
            {
                "kind": "parallel",
                "sources": sources,
                "options": asdict(options),
                "directions": options.directions,
                "counts": dict(counts),
                "documents_per_direction": dict(per_direction),
                "tokenizer": tokenizer.describe(),
            }
        )
    logger.info("%s: %s; %d tokens", prefix, summarise(counts), manifest["tokens"])
    return manifest


def _usable_pairs(
    inputs: Sequence[str | Path], tokenizer: TextTokenizer, options: ParallelOptions, counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yield the cleaned pairs that pass the text filters; count the others."""
    seen = Deduplicator()
    for path in inputs:
        for _, row in read_rows(path, options.columns):
            counts["read"] += 1
            source, target = (clean(row[column]) for column in options.columns)
            reason = _why_dropped(source, target, tokenizer, options)
            if reason is None and not options.keep_duplicates and not seen.is_new(source, target):
                reason = "duplicate"
            if reason is None:
                yield source, target
            else:
                drop(counts, reason)


def _why_dropped(source: str, target: str, tokenizer: TextTokenizer, options: ParallelOptions) -> str | None:
    """Name the first filter that a pair fails, None when it passes all.

    A line break counts as a control character: only the first line of what a model generates is its translation.
    """
    sides = (reading(source), options.source_language), (reading(target), options.target_language)
    if not all(text for text, _ in sides):
        return "empty"
    if any(has_control_characters(text, allowed="\t") for text in (source, target)):
        return "control_character"
    if any(tokenizer.holds_control_token(text) for text in (source, target)):
        return "special_token"
    lengths = [count_words(text, language) for text, language in sides]
    if min(lengths) < options.min_words:
        return "too_few_words"
    return "too_many_words" if max(lengths) > options.max_words else None


def _encode(
    pairs: Sequence[tuple[str, str]], tokenizer: TextTokenizer, options: ParallelOptions, counts: Counter[str]
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield (mode, prompt ids, target ids with EOS) of each pair and direction, a pair's directions together."""
    prompts, targets = [], []
    languages = options.source_language, options.target_language
    for pair in pairs:
        for mode in range(len(options.directions)):
            step = -1 if mode else 1
            source, target = pair[::step]
            prompts.append(options.template.render(source, *languages[::step]))
            targets.append(target)
    encoded = encode_pairs(tokenizer, prompts, targets)
    if encoded.encoded_alone:
        counts["target_encoded_alone"] += encoded.encoded_alone
    for place, (prompt_ids, target_ids) in enumerate(zip(encoded.prompts, encoded.targets, strict=True)):
        yield place % len(options.directions), prompt_ids, target_ids
