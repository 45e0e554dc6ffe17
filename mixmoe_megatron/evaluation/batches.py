"""Texts as padded batches of token ids: each text's tokens once, sequences of similar length together.

A text's first token is predicted from BOS, or from EOS where the tokenizer adds no BOS (what precedes a document in
packed training). Shape legend: B sequences in a batch, T padded length in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.progress import Progress

if TYPE_CHECKING:  # it imports the models of transformers
    from mixmoe_megatron.evaluation.models import LoadedModel

MAX_WINDOW = 1024  # tokens; longer texts are cut into windows
TOKENS_PER_BATCH = 4096


def split_windows(ids: Sequence[int], start_id: int, window: int) -> list[list[int]]:
    """Cut a text into sequences that predict each of its tokens exactly once.

    A sequence's first token is context only: `start_id`, or the last token of the sequence before.

    Args:
        ids: The text's tokens.
        start_id: Context of the first one.
        window: Most tokens of a sequence, context included; at least 2.
    """
    whole = [start_id, *ids]
    return [whole[start : start + window] for start in range(0, len(ids), window - 1)]


def batches_by_length(sequences: Sequence[list[int]], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield batches of similar length, longest first, that hold about `tokens_per_batch` padded tokens.

    Args:
        sequences: Token ids.
        tokens_per_batch: A batch of one sequence may hold more.

    Yields:
        Indices of sequences.
    """
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True):
        if batch and (len(batch) + 1) * len(sequences[batch[0]]) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(batch: Sequence[list[int]], side: str, pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences to one length.

    Args:
        batch: B lists of token ids.
        side: Where the padding goes, ``left`` or ``right``.
        pad_id: Fills up.
        device: Where the tensors go.

    Returns:
        input_ids: [B, T] int64. attention_mask: [B, T] int64, 1 on tokens and 0 on padding.
    """
    rows = [torch.tensor(ids) for ids in batch]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return input_ids.to(device), mask.to(device)


def text_batches(
    loaded: LoadedModel,
    texts: Sequence[str],
    purpose: str,
    *,
    max_window: int = MAX_WINDOW,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield all texts in batches that are padded on the right, and show how far the work is.

    Args:
        loaded: Its tokenizer encodes the texts; its device gets the tensors.
        texts: One text an entry, each by itself.
        purpose: What is measured on them, for the progress line and the message.
        max_window: Longest sequence in tokens; the model's own limit applies as well.
        tokens_per_batch: Padded tokens of a batch.

    Yields:
        The number of each sequence's text (B integers); input_ids and attention_mask as `pad` returns them. The first
        token of each sequence is context only.

    Raises:
        MixMoEError: There is no text, or nothing in it but unknown space.
    """
    window = min(max_window, loaded.max_positions or max_window)
    encoded = loaded.tokenizer.encode(list(texts), add_special_tokens=False)
    windows = [split_windows(ids, loaded.start_id, window) for ids in encoded]
    numbers = [number for number, pieces in enumerate(windows) for _ in pieces]
    sequences = [piece for pieces in windows for piece in pieces]
    if not sequences:
        raise MixMoEError(f"There is no text to measure {purpose} on.")
    work = sum(map(len, encoded))
    with Progress(f"{loaded.name} {purpose}", len(sequences), work=work, unit="texts") as progress:
        for batch in batches_by_length(sequences, tokens_per_batch):
            pieces = [sequences[index] for index in batch]
            yield [numbers[index] for index in batch], *pad(pieces, "right", loaded.tokenizer.pad_id, loaded.device)
            read = sum(len(piece) - 1 for piece in pieces)
            progress.advance(len(batch), read, read)
