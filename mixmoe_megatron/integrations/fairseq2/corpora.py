"""Dataset families: monolingual text for stage 1, translation pairs for stage 2, read by fairseq2's data pipelines.

A document is made as `mixmoe preprocess` makes it, so both engines train on the same tokens; it is held in memory,
as int32. Monolingual text is packed: a batch is one row of documents that do not see each other, the last of them cut.
Pairs are padded: a batch is of pairs of similar length, and the loss is on the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq2.data.data_pipeline import (
    CollateOptionsOverride,
    Collater,
    DataPipelineBuilder,
    create_bucket_sizes,
    read_sequence,
)
from fairseq2.datasets import DataPipelineReader, SequenceBatch
from fairseq2.gang import Gangs
from fairseq2.logging import log
from torch import Tensor

from mixmoe_megatron.data.monolingual import MonolingualOptions, monolingual_documents
from mixmoe_megatron.data.parallel_build import ParallelOptions, parallel_documents
from mixmoe_megatron.data.prompts import load_template
from mixmoe_megatron.data.tokenizers import TextTokenizer
from mixmoe_megatron.errors import MixMoEError

ToBatch = Callable[[dict[str, Any]], SequenceBatch]

MONOLINGUAL_FAMILY, PARALLEL_FAMILY = "mixmoe_monolingual", "mixmoe_parallel"


@dataclass(frozen=True)
class ReadOptions:
    """How documents become batches.

    Attributes:
        max_seq_len: most tokens of a sequence, EOS included.
        max_num_tokens: most tokens of a batch, padding included.
        num_accumulate: batches of an optimizer step.
        shuffle_window: documents among which the order is drawn; 0: all, 1: as they come.
        prefetch: batches that are made ahead.
        seed: of the order.
    """

    max_seq_len: int
    max_num_tokens: int
    num_accumulate: int = 1
    shuffle_window: int = 0
    prefetch: int = 4
    seed: int = 2


@dataclass(kw_only=True)
class MonolingualCorpusConfig:
    """Text for stage 1.

    Attributes:
        paths: plain text, a document a line; with `columns` TSV with a header, or JSONL. Compressed or not.
        columns: of a table: their texts in turn.
        group_by: column whose equal, consecutive values join rows to one document.
        min_tokens: a document is kept when it has more tokens than this, BOS and EOS not counted.
        keep_duplicates: keep a document that came before.
    """

    paths: list[Path] = field(default_factory=list)
    columns: list[str] | None = None
    group_by: str | None = None
    min_tokens: int = MonolingualOptions.min_tokens
    keep_duplicates: bool = False


@dataclass(kw_only=True)
class PairsConfig:
    """Translation pairs of two languages, see `ParallelOptions`.

    Attributes:
        paths: TSV with a header, or JSONL. Compressed or not.
        source_language: its code.
        target_language: its code.
        source_column: of the table; None: the source language's code.
        target_column: of the table; None: the target language's code.
        both_directions: learn each pair in both directions.
        min_words: least words of either side.
        max_words: most words of either side.
        keep_duplicates: keep a pair that came before.
    """

    paths: list[Path] = field(default_factory=list)
    source_language: str = ""
    target_language: str = ""
    source_column: str | None = None
    target_column: str | None = None
    both_directions: bool = False
    min_words: int = ParallelOptions.min_words
    max_words: int = ParallelOptions.max_words
    keep_duplicates: bool = False


@dataclass(kw_only=True)
class ParallelCorpusConfig:
    """Translation pairs for stage 2.

    Attributes:
        pairs: of two languages each.
        prompt_template: a file; None: ALMA's wording.
    """

    pairs: list[PairsConfig] = field(default_factory=list)
    prompt_template: Path | None = None


class MonolingualCorpus:
    """Text for stage 1.

    Args:
        config: what to read.

    Raises:
        MixMoEError: no file is named, or the options contradict each other.
    """

    def __init__(self, config: MonolingualCorpusConfig) -> None:
        _check_paths(config.paths, MONOLINGUAL_FAMILY)
        columns = None if config.columns is None else tuple(config.columns)
        self.paths = config.paths
        self.options = MonolingualOptions(config.min_tokens, columns, config.group_by, config.keep_duplicates)

    def create_reader(
        self, tokenizer: TextTokenizer, gangs: Gangs, options: ReadOptions
    ) -> DataPipelineReader[SequenceBatch]:
        """Read all text, and return a reader of packed batches.

        Args:
            tokenizer: the model's.
            gangs: each data-parallel rank reads its own documents.
            options: of the batches.

        Raises:
            MixMoEError: a file is unreadable, or no document is left.
        """
        counts: Counter[str] = Counter()
        found = monolingual_documents(self.paths, tokenizer, self.options, counts)
        documents = [np.array(ids, np.int32) for (ids,), _ in found]
        _report(counts, len(documents), "documents")

        def tensor(index: int) -> Tensor:
            return torch.from_numpy(documents[index]).to(torch.int64)

        builder = _in_order(len(documents), gangs, options).map(tensor)
        builder = builder.pack(
            options.max_num_tokens, options.max_seq_len, pad_value=tokenizer.pad_id, truncate=True, drop_remainder=False
        )
        return _reader(builder, packed_batch, gangs, options)


class ParallelCorpus:
    """Translation pairs for stage 2.

    Args:
        config: what to read.

    Raises:
        MixMoEError: no file is named, a language is unknown, or the template is no prompt.
    """

    def __init__(self, config: ParallelCorpusConfig) -> None:
        self.pairs = config.pairs
        self.template = load_template(config.prompt_template)
        _check_paths([path for pairs in self.pairs for path in pairs.paths], PARALLEL_FAMILY)
        for pairs in self.pairs:
            self._options(pairs, max_tokens=None)

    def create_reader(
        self, tokenizer: TextTokenizer, gangs: Gangs, options: ReadOptions
    ) -> DataPipelineReader[SequenceBatch]:
        """Read all pairs, and return a reader of padded batches. Pairs longer than max_seq_len are left out, counted.

        Args:
            tokenizer: the model's.
            gangs: each data-parallel rank reads its own pairs.
            options: of the batches.

        Raises:
            MixMoEError: a file is unreadable or lacks a column, no pair is left, or a batch has no room for one.
        """
        if options.max_num_tokens < options.max_seq_len:
            raise MixMoEError(
                f"dataset.max_num_tokens is {options.max_num_tokens}, which has no room for a sequence of "
                f"dataset.max_seq_len, {options.max_seq_len}."
            )
        counts: Counter[str] = Counter()
        documents = list(self._documents(tokenizer, options.max_seq_len, counts))
        _report(counts, len(documents), "pairs and directions")

        def example(index: int) -> dict[str, Tensor]:
            ids, prompt_length = documents[index]
            indices = torch.from_numpy(ids).to(torch.int64)
            return {"indices": indices, "target_mask": torch.arange(len(indices)) >= prompt_length}

        room = options.max_num_tokens // options.max_seq_len * options.max_seq_len  # fairseq2 wants a multiple
        sizes = create_bucket_sizes(max_seq_len=options.max_seq_len, min_seq_len=1, max_num_elements=room)
        mask = CollateOptionsOverride("target_mask", pad_value=False)
        collate = Collater(pad_value=tokenizer.pad_id, overrides=[mask])
        builder = _in_order(len(documents), gangs, options).map(example).bucket_by_length(sizes, selector="indices")
        if options.shuffle_window != 1:
            builder = builder.shuffle(options.shuffle_window, seed=options.seed + 1)
        return _reader(builder.map(collate), padded_batch, gangs, options)

    def _documents(
        self, tokenizer: TextTokenizer, max_tokens: int, counts: Counter[str]
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the tokens of each document, int32, and how many of them are its prompt's."""
        for pairs in self.pairs:
            options = self._options(pairs, max_tokens)
            for (prompt, target), _ in parallel_documents(pairs.paths, tokenizer, options, counts):
                yield np.array([*prompt, *target], np.int32), len(prompt)

    def _options(self, pairs: PairsConfig, max_tokens: int | None) -> ParallelOptions:
        fields = {name: value for name, value in vars(pairs).items() if name != "paths"}
        return ParallelOptions(**fields, max_tokens=max_tokens, template=self.template)


def packed_batch(packed: dict[str, Any]) -> SequenceBatch:
    """Return what `pack` gives as a batch, in which no document's first token is a target: none stands before it.

    Args:
        packed: seqs, [T] int64, and seq_lens, the tokens of each document; what follows them is padding.
    """
    seqs, lengths = packed["seqs"], list(packed["seq_lens"])
    target_mask = torch.zeros_like(seqs, dtype=torch.bool)
    target_mask[: sum(lengths)] = True
    target_mask[np.cumsum([0, *lengths[:-1]])] = False
    return SequenceBatch(seqs, lengths, packed=True, target_mask=target_mask)


def padded_batch(collated: dict[str, Any]) -> SequenceBatch:
    """Return what `Collater` gives as a batch.

    Args:
        collated: indices with seqs, [B, S] int64, and seq_lens; target_mask likewise, bool, False on the prompt.
    """
    indices, mask = collated["indices"], collated["target_mask"]
    return SequenceBatch(indices["seqs"], list(indices["seq_lens"]), target_mask=mask["seqs"])


def _check_paths(paths: list[Path], family: str) -> None:
    if not paths:
        raise MixMoEError(f"A dataset of the family {family} names no file: give paths in dataset.config_overrides.")


def _report(counts: Counter[str], kept: int, what: str) -> None:
    """Log how many documents were read, dropped for each reason, and kept.

    Raises:
        MixMoEError: none was kept.
    """
    told = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(counts.items()))
    if not kept:
        raise MixMoEError(f"The dataset holds no {what} to learn from ({told}).")
    log.info("Dataset: {} {} kept ({}).", kept, what, told)


def _in_order(number: int, gangs: Gangs, options: ReadOptions) -> DataPipelineBuilder:
    """Return a pipeline of the places of this rank's documents, another order in each epoch."""
    builder = read_sequence(range(number))
    if options.shuffle_window != 1:
        builder = builder.shuffle(options.shuffle_window, seed=options.seed)
    return builder.shard(gangs.dp.rank, gangs.dp.size, allow_uneven=True)


def _reader(
    builder: DataPipelineBuilder,
    to_batch: Callable[[dict[str, Any]], SequenceBatch],
    gangs: Gangs,
    options: ReadOptions,
) -> DataPipelineReader[SequenceBatch]:
    pipeline = builder.prefetch(options.prefetch).map(to_batch).and_return()
    return DataPipelineReader(pipeline, gangs, num_accumulate=options.num_accumulate)
